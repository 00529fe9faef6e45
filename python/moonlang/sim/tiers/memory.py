"""What the tiers are made of: a device pool that others write into, slots of host memory, a store."""

from __future__ import annotations

from dataclasses import dataclass

from moonlang.sim.executor import PagedCells
from moonlang.sim.violation import Violation


@dataclass(frozen=True, slots=True)
class Content:
    """Of one page: its running sums, and the extra key of the request that they were computed for."""

    sums: tuple[int, ...]
    extra_key: str


RUBBISH = (-1,)  # the sums of a page that something is being read into
_SPOILED = -1  # attention over pages that hold no sense


class TierCells(PagedCells):
    """PagedCells that tiers copy from and to."""

    def read(self, table: list[int], length: int) -> int:
        """A row of a request that has ended meanwhile may read pages that tiers fill by now: nobody will look at what
        comes of it. Should somebody, it is wrong."""
        try:
            return super().read(table, length)
        except Violation:
            return _SPOILED

    def sums(self, page: int) -> tuple[int, ...]:
        return tuple(self._sums[page])

    def fill(self, page: int, sums: tuple[int, ...]) -> None:
        self._sums[page][:] = sums


class SharedStore:
    """Objects by key. At most `capacity`; the oldest go first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._objects: dict[bytes, Content] = {}

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, key: bytes) -> Content | None:
        return self._objects.get(key)

    def put(self, key: bytes, content: Content) -> None:
        """What is there stays."""
        self._objects.setdefault(key, content)
        while len(self._objects) > self._capacity:
            del self._objects[next(iter(self._objects))]

    def remove(self, key: bytes) -> None:
        self._objects.pop(key, None)

    def lose_all(self) -> None:
        """Its master was restarted."""
        self._objects.clear()
