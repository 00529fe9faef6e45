"""The private folder of a running server: mailbox sockets, the children's jobs, heartbeats. Gone when it is, and with
it what its ranks have put into shared memory under its name."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "moonlang-run-"
_OWNER = "owner.lock"
_SHARED_MEMORY = Path("/dev/shm")
_LONGEST_SOCKET_PATH = 107  # bytes, from sockaddr_un
BASE_VARIABLE = "MOONLANG_RUN_BASE"  # environment: a folder that goes with whoever started this process
_RANDOM_BYTES = 8  # that tempfile puts behind the prefix
_LONGEST_FILE_NAME = 24  # bytes
LONGEST_NAME = 24  # bytes, of a run directory with a known place


class RunDirectory:
    """A folder that only this user can enter (0700), locked for as long as its owner lives."""

    def __init__(self, name: str | None = None) -> None:
        """name: a known place, see `named`; FileExistsError when a living owner has it."""
        base = _base()
        reap(base)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        # The lock is taken before the file gets the name that `reap` looks for.
        unnamed = self.path / "unowned"
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _OWNER)
        if name is not None:
            self._move(named(name))

    def remove(self) -> None:
        """Delete the folder, when nobody uses it any more. May be called twice."""
        if self._lock >= 0:
            _delete(self.path)
            os.close(self._lock)
            self._lock = -1

    def _move(self, place: Path) -> None:
        try:
            self.path.rename(place)  # takes the place of nothing but an empty folder
        except OSError:
            self.remove()
            raise FileExistsError(place) from None
        self.path = place


def named(name: str) -> Path:
    """Where this user's run directory of that name is, or would be. name: at most LONGEST_NAME bytes."""
    return _base() / f"{_PREFIX}{os.getuid()}-{name}"


def _base() -> Path:
    """Where the starter wants it, or the system's folder for temporary files; /tmp when socket paths below that would
    get too long."""
    given = os.environ.get(BASE_VARIABLE)
    base = Path(given or tempfile.gettempdir())
    name_bytes = _RANDOM_BYTES if given else len(f"{os.getuid()}-") + LONGEST_NAME
    longest = len(os.fsencode(base / _PREFIX)) + name_bytes + 1 + _LONGEST_FILE_NAME
    return base if longest <= _LONGEST_SOCKET_PATH else Path("/tmp")


def reap(base: Path | None = None) -> int:
    """Delete this user's run directories whose owner is dead: nobody holds their lock any more. How many there were."""
    base = base or _base()
    reaped = 0
    for owner in base.glob(f"{_PREFIX}*/{_OWNER}"):
        try:
            if owner.stat().st_uid != os.getuid():
                continue
            lock = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another server was faster, or it is not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink == 0:
                continue  # another was faster, and the folder may be a successor's by now
            _delete(owner.parent)
            reaped += 1
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)
    return reaped


def _delete(directory: Path) -> None:
    """A run directory, and those inside: a cluster's servers have theirs in its own."""
    for each in (directory, *directory.glob(f"{_PREFIX}*")):
        for segment in _SHARED_MEMORY.glob(f"{each.name}-*"):
            segment.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
