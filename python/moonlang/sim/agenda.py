"""What is going to happen, in virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Agenda:
    """Actions by time; those of the same time in the order in which they were entered."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    @property
    def next_ns(self) -> int | None:
        """When the next action is due."""
        return self._heap[0][0] if self._heap else None

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time_ns, self._count, action))

    def run_one(self) -> None:
        """Advance to the next action and carry it out."""
        time_ns, _, action = heapq.heappop(self._heap)
        self.now_ns = max(self.now_ns, time_ns)
        action()

    def run_due(self) -> None:
        """Carry out all that is due by now, also what is entered meanwhile."""
        while self._heap and self._heap[0][0] <= self.now_ns:
            heapq.heappop(self._heap)[2]()
