"""The directory of the host pool: which page, by its key, lies in which slot. Numbers only; the bytes are a channel's.

    free --reserve--> filling --filled--> ready --evict--> free

A ready slot that is being read is pinned and stays. When room is short the page goes whose loss costs least: GreedyDual
with size and frequency (Cao and Irani 1997, Cherkasova 1998). All pages have one size, so a page's rank is
floor + uses x cost, and the floor rises to the rank of whatever goes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from moonlang.base.errors import BugError


@dataclass(slots=True)
class _Entry:
    """One page. cost: of computing it again, relative to the first page of a prompt."""

    key: bytes
    slot: int
    cost: int
    order: int  # of entry, to break ties
    rank: int = 0
    uses: int = 1
    pins: int = 0
    ready: bool = False
    gone: bool = False


@dataclass(order=True, slots=True)
class _Listed:
    """An entry in the heap with the rank it had then; put right when it is popped."""

    rank: int
    order: int
    entry: _Entry = field(compare=False)


class HostDirectory:
    """`num_slots` slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: dict[bytes, _Entry] = {}
        self._heap: list[_Listed] = []
        self._floor = 0
        self._counter = 0

    def __contains__(self, key: bytes) -> bool:
        """Present, or on its way in."""
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def free(self) -> int:
        return len(self._free)

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys can be read now."""
        for i, key in enumerate(keys):
            entry = self._entries.get(key)
            if entry is None or not entry.ready:
                return i
        return len(keys)

    def reserve(self, key: bytes, cost: int) -> int | None:
        """A slot for a page that is to be copied in; None when everything is in use. The key must be absent."""
        if key in self._entries:
            raise BugError("A page is to enter the host pool twice.")
        if not self._free and not self._evict():
            return None
        self._counter += 1
        entry = _Entry(key, self._free.pop(), cost, self._counter)
        self._entries[key] = entry
        return entry.slot

    def filled(self, key: bytes) -> None:
        """The copy into the slot has arrived."""
        entry = self._entries[key]
        entry.ready = True
        self._rank(entry)

    def pin(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """Keep these pages, all readable, while their slots are read; returns the slots."""
        entries = [self._entries[key] for key in keys]
        for entry in entries:
            entry.pins += 1
            entry.uses += 1
        return tuple(entry.slot for entry in entries)

    def unpin(self, keys: Sequence[bytes]) -> None:
        """These pages have been read."""
        for key in keys:
            entry = self._entries[key]
            entry.pins -= 1
            if entry.ready:
                self._rank(entry)
            elif not entry.pins:
                self.drop(key)

    def distrust(self, key: bytes) -> None:
        """A pinned page whose checksum did not hold: nobody reads it any more, and it goes with the last pin."""
        self._entries[key].ready = False

    def drop(self, key: bytes) -> None:
        """Forget a page that nobody reads."""
        entry = self._entries.pop(key)
        if entry.pins:
            raise BugError("A page of the host pool is dropped while it is read.")
        entry.gone = True
        self._free.append(entry.slot)

    def clear(self) -> None:
        """Forget every page that is neither read nor on its way in."""
        for entry in [e for e in self._entries.values() if e.ready and not e.pins]:
            self.drop(entry.key)

    def check(self, *, idle: bool) -> None:
        """BugError unless every slot has one owner, and when `idle` nobody reads or fills one: O(slots)."""
        if idle and any(entry.pins or not entry.ready for entry in self._entries.values()):
            raise BugError("A host slot is read or filled although nothing is under way.")
        slots = self._free + [entry.slot for entry in self._entries.values()]
        if sorted(slots) != list(range(self.num_slots)):
            raise BugError(f"{self.num_slots} host slots, {len(self._free)} free, {len(self._entries)} in use.")

    def _rank(self, entry: _Entry) -> None:
        """Rank the entry by its present worth, and list it anew."""
        entry.rank = self._floor + entry.uses * entry.cost
        self._counter += 1
        heapq.heappush(self._heap, _Listed(entry.rank, entry.order, entry))
        if len(self._heap) > 2 * self.num_slots + 16:
            live = [e for e in self._entries.values() if e.ready]
            self._heap = [_Listed(e.rank, e.order, e) for e in live]
            heapq.heapify(self._heap)

    def _evict(self) -> bool:
        """Make one slot free; False when every page is read or on its way in."""
        while self._heap:
            listed = heapq.heappop(self._heap)
            entry = listed.entry
            if entry.gone or entry.pins or listed.rank != entry.rank:
                continue  # listed again when it is unpinned, or under its new rank
            self._floor = entry.rank
            self.drop(entry.key)
            return True
        return False
