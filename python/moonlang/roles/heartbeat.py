"""How the parent sees that a role's loop still turns: one shared time stamp per role, no messages."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from moonlang.base.clock import NS_PER_S

_STAMP = struct.Struct("=q")
_BEATS_PER_TIMEOUT = 4


class Heartbeat:
    """The monotonic time of a role's last step, in memory shared between processes through a file.

    path None keeps it within this process. timeout_s: the age at which a role counts as hung; 0 or less: never.
    """

    def __init__(self, path: Path | None, timeout_s: float) -> None:
        self.timeout_ns = int(timeout_s * NS_PER_S) if timeout_s > 0 else 2**62
        self.interval_ns = self.timeout_ns // _BEATS_PER_TIMEOUT
        fd = -1
        if path is not None:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(fd, _STAMP.size)
        self._memory = mmap.mmap(fd, _STAMP.size)
        if fd >= 0:
            os.close(fd)

    def beat(self, now_ns: int) -> None:
        _STAMP.pack_into(self._memory, 0, now_ns)

    def is_late(self, now_ns: int) -> bool:
        """True when the role has begun to beat and its last beat is older than the timeout."""
        (last_ns,) = _STAMP.unpack_from(self._memory, 0)
        return last_ns != 0 and now_ns - last_ns > self.timeout_ns

    def close(self) -> None:
        self._memory.close()
