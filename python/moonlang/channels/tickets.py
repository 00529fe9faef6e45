"""Tickets and their completions, which may come from any thread."""

from __future__ import annotations

import threading

from moonlang.base.wakeup import Wakeup
from moonlang.core.ticket import Completion, Ticket


class Tickets:
    """Issues tickets of one kind and collects completions; its descriptor is readable while some are waiting."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._next = 0
        self._lock = threading.Lock()
        self._done: list[Completion] = []
        self._wakeup = Wakeup()
        self._closed = False

    def issue(self) -> Ticket:
        ticket = Ticket(self._next, self._kind)
        self._next += 1
        return ticket

    def complete(self, completion: Completion) -> None:
        """May be called from any thread. Nobody hears of it after `close`."""
        with self._lock:
            if not self._closed:
                self._done.append(completion)
                self._wakeup.set()

    def take(self) -> list[Completion]:
        """What has completed since the last call, sorted by ticket id; never blocks."""
        with self._lock:
            self._wakeup.clear()
            done, self._done = self._done, []
        return sorted(done, key=lambda completion: completion.ticket.id)

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._closed = True
            self._wakeup.close()
