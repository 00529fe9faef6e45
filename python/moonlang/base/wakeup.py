"""A flag that `select`, `epoll` and `asyncio.add_reader` can wait for."""

from __future__ import annotations

import contextlib
import os
import select

from moonlang.base.clock import NS_PER_MS

_LONGEST_WAIT_MS = 24 * 3600 * 1000  # poll(2) takes a C int; who waits longer is woken once a day


class Wakeup:
    """Readable exactly while the flag is set. `set` may be called from any thread or signal handler."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.is_set = False

    def set(self) -> None:
        self.is_set = True
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        self.is_set = False
        with contextlib.suppress(BlockingIOError):  # it was not set
            os.eventfd_read(self._fd)

    def wait(self, timeout_ns: int) -> bool:
        """Sleep until the flag is set (True) or the time is up."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(wait_ms(timeout_ns)))

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Free the descriptor. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def wait_ms(timeout_ns: int) -> int:
    """A timeout for poll(2): in [0, one day], rounded up so that a deadline has passed when poll returns for it."""
    return max(0, min(-(-timeout_ns // NS_PER_MS), _LONGEST_WAIT_MS))
