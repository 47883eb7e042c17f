"""A server's private directory: sockets, shared memory, metrics. Knows folders and locks; not what is in them.

Whoever is killed with SIGKILL leaves its directory behind; the next server takes it away. A lock that the kernel drops
with its holder tells the dead from the living, also between containers that share a /tmp, where a pid says nothing.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "ropeway-"
OWNER = "owner"
"""File in the directory that its server holds locked (flock(2)) as long as it lives."""


class NoPlace(Exception):
    """There is nowhere to make it; the message is one sentence that says what to do."""


class PrivateDirectory:
    """Made when constructed, for this user alone (0700); those of dead servers beside it are removed.

    Args:
        longest: bytes that its path may have; /tmp is taken where the usual place is longer.

    Raises:
        NoPlace.
    """

    def __init__(self, longest: int) -> None:
        try:
            base = tempfile.gettempdir()
        except OSError as error:
            raise NoPlace(
                "There is no folder for temporary files that can be written to; name one in TMPDIR"
            ) from error
        if len(os.fsencode(f"{base}/{PREFIX}xxxxxxxx")) > longest:
            base = "/tmp"
        _remove_the_dead(Path(base))
        try:
            self.path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
            self._lock = _locked(f"{self.path}/{OWNER}.new")
        except OSError as error:
            raise NoPlace(f"Cannot write to {base}: {error.strerror}; name a short folder in TMPDIR") from error
        assert self._lock is not None
        os.rename(f"{self.path}/{OWNER}.new", f"{self.path}/{OWNER}")  # seen by others only when it is locked

    def remove(self) -> None:
        """Takes it away with everything in it. Idempotent."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _locked(path: str | Path) -> int | None:
    """A descriptor that holds the file's lock; None if another process does. Children do not inherit it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_the_dead(base: Path) -> None:
    """Removes the directories of this user's servers that live no more."""
    for owner in base.glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError):  # it is gone by now, or somebody else's
            if owner.parent.stat().st_uid == os.getuid() and (lock := _locked(owner)) is not None:
                shutil.rmtree(owner.parent, ignore_errors=True)
                os.close(lock)
