"""Private directories: whose they are, and what becomes of those whose server was killed."""

import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ropeway.scheduler import private_directory
from ropeway.scheduler.private_directory import NoPlace, PrivateDirectory

HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from ropeway.scheduler.private_directory import PrivateDirectory
directory = PrivateDirectory(100)
print(directory.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_dead_are_removed_and_the_living_stay(temporary: Path) -> None:
    """Guards /tmp: every server killed with SIGKILL left a folder for ever; and the one beside it, which still runs."""
    commands = [[sys.executable, "-c", HOLD, str(temporary)] for _ in range(2)]
    servers = [subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for c in commands]
    paths = []
    for server in servers:
        assert server.stdout
        paths.append(Path(server.stdout.readline().strip()))
        (paths[-1] / "e1w0.in").touch()
    servers[0].send_signal(signal.SIGKILL)
    servers[0].wait()
    stranger = temporary / "ropeway-of-somebody"
    stranger.mkdir()
    ours = PrivateDirectory(1000)
    assert not paths[0].exists() and (paths[1] / "e1w0.in").exists() and stranger.exists()
    servers[1].communicate("")
    PrivateDirectory(1000).remove()
    assert not paths[1].exists() and Path(ours.path).exists()
    ours.remove()
    assert [path.name for path in temporary.iterdir()] == [stranger.name]
    for server in servers:
        assert server.stdin and server.stdout
        server.stdin.close()
        server.stdout.close()


def test_it_is_private() -> None:
    """Guards sockets and metrics against other users of the machine."""
    directory = PrivateDirectory(1000)
    assert stat.S_IMODE(Path(directory.path).stat().st_mode) == 0o700
    directory.remove()
    directory.remove()


def test_a_long_path_is_not_taken(temporary: Path) -> None:
    """Guards sockets, whose path the kernel limits to 108 bytes."""
    directory = PrivateDirectory(len(str(temporary)))
    assert directory.path.startswith("/tmp/ropeway-")
    directory.remove()


def test_no_place(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """Guards read-only containers: without a temporary folder the start fails in a sentence that says what to do."""

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    with monkeypatch.context() as patch:
        patch.setattr(private_directory.tempfile, "gettempdir", lambda: str(temporary / "missing"))
        with pytest.raises(NoPlace, match=r"Cannot write to .*missing: No such file or directory; name a short folder"):
            PrivateDirectory(1000)
    monkeypatch.setattr(private_directory.tempfile, "gettempdir", nowhere)
    with pytest.raises(NoPlace, match="TMPDIR"):
        PrivateDirectory(1000)
