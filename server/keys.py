"""API keys, from flags or a file. Keeps hashes only; knows no HTTP."""

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from ropeway.server.errors import UsageError
from ropeway.server.settings import Settings

KEY_ID_LENGTH = 12


def key_hash(key: str) -> bytes:
    """SHA-256 of a key: keys are long random strings, so a slow hash would add nothing."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """The keys that open the server; none at all leaves it open."""

    def __init__(self, hashes: Iterable[bytes]) -> None:
        self._hashes = tuple(hashes)

    @classmethod
    def load(cls, settings: Settings) -> "KeyRing":
        """From `--api-key` and `--api-key-file`. Raises: UsageError if the file is not one of keys."""
        hashes = [key_hash(key) for key in settings.api_key]
        if settings.api_key_file is not None:
            hashes += read_key_file(Path(settings.api_key_file))
        return cls(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def key_id(self, authorization: str) -> str | None:
        """Short hash of the key in an `Authorization` header, None if it is none of ours.

        Compares with every key in constant time, so that the answer's time tells nothing.
        """
        scheme, _, key = authorization.partition(" ")
        presented = key_hash(key.strip())
        known = [hmac.compare_digest(presented, one) for one in self._hashes]
        if scheme.lower() != "bearer" or not any(known):
            return None
        return presented.hex()[:KEY_ID_LENGTH]


def read_key_file(path: Path) -> list[bytes]:
    """One key a line, plain or `sha256:HEX`; empty lines and # comments do not count. Raises: UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read ({error}).") from None
    hashes = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not text.startswith("sha256:"):
            hashes.append(key_hash(text))
            continue
        try:
            digest = bytes.fromhex(text.removeprefix("sha256:"))
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise UsageError(f"--api-key-file {path}, line {number}: sha256: wants 64 hexadecimal digits.")
        hashes.append(digest)
    if not hashes:
        raise UsageError(f"--api-key-file {path} holds no key.")
    return hashes
