"""API keys: from flags and files, compared as hashes."""

from hashlib import sha256
from pathlib import Path

import pytest

from ropeway.server.errors import UsageError
from ropeway.server.keys import KeyRing, key_hash
from ropeway.server.settings import Settings


def test_identifies_by_key() -> None:
    """Guards the door and fair share: each key has its own short id, anything else has none."""
    ring = KeyRing.load(Settings(api_key=("one", "two")))
    one, two = ring.key_id("Bearer one"), ring.key_id("bearer two")
    assert one and two and one != two and one == key_hash("one").hex()[:12]
    for header in ("Bearer three", "Bearer", "one", "Basic one", "Bearer one two", "", "Bearer \xe9"):
        assert ring.key_id(header) is None


def test_no_key_leaves_it_open() -> None:
    """Guards the test for an open server: an empty ring is false."""
    assert not KeyRing.load(Settings())
    assert KeyRing([]).key_id("Bearer ") is None


def test_file(tmp_path: Path) -> None:
    """Guards hashed key files: plain and hashed lines open alike, comments do not count."""
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nplain-key\nsha256:{sha256(b'hidden').hexdigest()}\n")
    ring = KeyRing.load(Settings(api_key_file=str(file), api_key=("flag",)))
    assert all(ring.key_id(f"Bearer {key}") for key in ("plain-key", "hidden", "flag"))
    assert ring.key_id("Bearer # ours") is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "sha256:abc\n", "sha256:zz\n"])
def test_wrong_files(tmp_path: Path, text: str) -> None:
    """Guards against a server that starts open, or with a key nobody has, because its file was wrong."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError, match="--api-key-file"):
        KeyRing.load(Settings(api_key_file=str(file)))


def test_missing_file() -> None:
    """Guards the start: one sentence, no traceback."""
    with pytest.raises(UsageError, match="cannot be read"):
        KeyRing.load(Settings(api_key_file="/no/such/file"))
