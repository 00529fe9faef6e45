"""Memory that two processes of one host share, and that nobody has to clean up: it has no name (memfd).

It is gone with the last process that has it open, also after SIGKILL. It is sealed, so that the process that made it
cannot shrink it under the feet of the one that reads: that would be a SIGBUS there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from moonlang.base.errors import PeerError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """A mapping of `size` bytes. fd: may be closed by its owner once the other side has it; the mapping stays."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Unmap it. All views of it must have been released before. May be called twice."""
        self.view.release()
        self._map.close()


def create(name: str, size: int) -> tuple[int, SharedMemory]:
    """New zeroed memory, and its descriptor. name: shown by /proc/PID/maps."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd, SharedMemory(fd, size)
    except BaseException:
        os.close(fd)
        raise


def attach(fd: int, size: int) -> SharedMemory:
    """Map what a peer has sent. PeerError unless it is sealed memory of that size."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        found = os.fstat(fd).st_size
    except OSError as error:
        raise PeerError(f"What a peer sent is no shared memory: {error}.") from error
    if not sealed or found != size:
        raise PeerError(f"A peer sent memory of {found} bytes where {size} sealed ones were expected.")
    return SharedMemory(fd, size)
