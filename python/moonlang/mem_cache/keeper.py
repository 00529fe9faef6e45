"""Pages on their way down: what a lower tier should hold is queued, coalesced and handed over batch by batch.

A queued page is locked in the tree, so its bytes stay until the tier has them. The queue is bounded: what does not fit
is not kept, which costs a recomputation and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from moonlang.core.lease import PrefixRef
from moonlang.mem_cache.radix import RadixCache


@dataclass(frozen=True, slots=True)
class Kept:
    """One page to hand down. cost: of computing it again, relative to a prompt's first page.

    ref: to be unlocked when this page, the last of its run, has been handed over.
    """

    key: bytes
    page: int
    cost: int
    ref: PrefixRef | None = None


class Keeper:
    """The way down to one tier. One batch at a time is under way, of at most `batch_pages`."""

    def __init__(self, cache: RadixCache, *, batch_pages: int, most_pages: int) -> None:
        self._cache = cache
        self._batch_pages = batch_pages
        self._most = most_pages
        self._queue: deque[Kept] = deque()
        self._under_way: list[Kept] = []
        self._owed: list[PrefixRef] = []  # locks of runs whose end is not under way any more: unlocked with the batch
        self._keys: set[bytes] = set()  # queued or under way
        self.dropped = 0  # pages that found the queue full, or had to leave it

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._queue) + len(self._under_way)

    @property
    def locks(self) -> list[PrefixRef]:
        """What it has locked in the tree."""
        return [kept.ref for kept in [*self._under_way, *self._queue] if kept.ref is not None] + self._owed

    def add(self, ref: PrefixRef, run: Sequence[Kept]) -> None:
        """Hand down a run of pages on the path of `ref`, which is locked meanwhile."""
        run = [kept for kept in run if kept.key not in self._keys]
        room = max(0, self._most - len(self))
        self.dropped += len(run[room:])
        run = run[:room]
        if not run:
            return
        self._cache.lock(ref)
        last = run[-1]
        self._queue.extend(run[:-1])
        self._queue.append(Kept(last.key, last.page, last.cost, ref))
        self._keys.update(kept.key for kept in run)

    def batch(self) -> list[Kept]:
        """The next batch to hand over; empty while one is under way or when there is nothing."""
        if self._under_way or not self._queue:
            return []
        self._under_way = [self._queue.popleft() for _ in range(min(self._batch_pages, len(self._queue)))]
        return self._under_way

    def done(self) -> list[Kept]:
        """The batch under way has been handed over, or has failed: its pages may go."""
        batch, self._under_way = self._under_way, []
        owed, self._owed = self._owed, []
        for kept in batch:
            self._keys.discard(kept.key)
        for ref in [*(kept.ref for kept in batch if kept.ref is not None), *owed]:
            self._cache.unlock(ref)
        return batch

    def drop_queued(self) -> None:
        """Let go of what is queued: its memory is needed. The batch under way keeps its locks."""
        is_cut = bool(self._under_way) and self._under_way[-1].ref is None  # the first run has begun
        queue, self._queue = self._queue, deque()
        self.dropped += len(queue)
        for kept in queue:
            self._keys.discard(kept.key)
            if kept.ref is None:
                continue
            if is_cut:
                self._owed.append(kept.ref)
                is_cut = False
            else:
                self._cache.unlock(kept.ref)
