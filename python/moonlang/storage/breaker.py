"""A circuit breaker: who does not answer is left alone for a while, then tried again."""

from __future__ import annotations

import threading

from moonlang.base.clock import NS_PER_S


class Breaker:
    """Closed while attempts succeed. `most` failures in a row open it for a while that doubles up to a bound. May be
    asked and told from different threads."""

    def __init__(self, *, most: int = 2, first_ns: int = NS_PER_S, longest_ns: int = 10 * NS_PER_S) -> None:
        self._most = most
        self._first_ns = first_ns
        self._longest_ns = longest_ns
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_ns = first_ns
        self._until_ns = 0

    @property
    def is_closed(self) -> bool:
        return self._failures < self._most

    def is_paused(self, now_ns: int) -> bool:
        """Whether nothing is to be tried yet."""
        return not self.is_closed and now_ns < self._until_ns

    def attempt(self, now_ns: int) -> None:
        """Something is tried although it is open: nothing else for the time being."""
        with self._lock:
            self._until_ns = now_ns + self._pause_ns

    def report(self, good: bool, now_ns: int) -> bool:
        """Outcome of an attempt. Returns whether this has opened or closed it."""
        with self._lock:
            was_closed = self.is_closed
            if good:
                self._failures = 0
                self._pause_ns = self._first_ns
            else:
                self._failures += 1
                if not self.is_closed:
                    self._until_ns = now_ns + self._pause_ns
                    self._pause_ns = min(2 * self._pause_ns, self._longest_ns)
            return self.is_closed != was_closed
