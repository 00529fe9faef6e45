"""Memory that processes of one host share: pools by the file behind them, and who counts as the same host."""

from __future__ import annotations

import mmap
import os
from functools import cache
from pathlib import Path

import numpy as np

from moonlang.base.errors import PeerError
from moonlang.core.kv import KvRegion
from moonlang.disaggregation.page_memory import Bytes


@cache
def host_name() -> str:
    """Equal in two processes when they see each other under /proc: one boot of one machine, one process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}:{os.getuid()}"


def handle(fd: int) -> str:
    """Names memory behind descriptor `fd` of this process for `attach` in another one."""
    return f"{os.getpid()}:{fd}:{os.fstat(fd).st_ino}"


def attach(region: KvRegion, handle: str) -> Bytes:
    """A peer's pool, [P, page bytes], mapped into this process. PeerError when its process is gone or out of reach.

    The mapping lives as long as the array does. It stays valid, and harmless, when the peer dies.
    """
    try:
        pid, fd, inode = (int(part) for part in handle.split(":"))
    except ValueError:
        raise PeerError(
            "The peer's pool cannot be mapped: it is not in shared memory.",
            hint="Give both instances the same --disaggregation-transfer-backend.",
        ) from None
    try:
        mapped = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PeerError(f"The pool of process {pid} cannot be opened: {error.strerror}.") from error
    try:
        found = os.fstat(mapped)
        size = region.num_pages * region.stride
        if found.st_ino != inode or found.st_size < size:  # the number belongs to another process by now
            raise PeerError(f"Process {pid} is not the one that owned the pool.")
        memory = mmap.mmap(mapped, size, flags=mmap.MAP_SHARED)
    finally:
        os.close(mapped)
    return np.frombuffer(memory, np.uint8).reshape(region.num_pages, region.stride)
