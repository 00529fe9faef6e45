"""Pages on their way down: what a lower tier should hold is queued, coalesced and handed over batch by batch.

A queued page is locked in the tree, so its bytes stay until the tier has them. The queue is bounded. What does not fit,
or has to leave it because its memory is needed, is put off: remembered without a lock, and queued again when there is
room, as far as the tree still has it. What is lost costs a recomputation and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moonlang.core.lease import PrefixRef
from moonlang.mem_cache.radix import RadixCache


@dataclass(frozen=True, slots=True)
class Run:
    """Pages [begin, end) of a prompt. names: the keys of its pages, at least `end` of them."""

    tokens: Sequence[int]
    extra_key: str
    names: Sequence[bytes]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One page to hand down. cost: of computing it again, relative to a prompt's first page.

    The last one of a run has ref, which is to be unlocked when it has been handed over, and the run.
    """

    key: bytes
    page: int
    cost: int
    ref: PrefixRef | None = None
    run: Run | None = None


class Keeper:
    """The way down to one tier. One batch at a time is under way, of at most `batch_pages`."""

    def __init__(self, cache: RadixCache, *, batch_pages: int, most_pages: int, most_put_off: int) -> None:
        """most_pages: that may be queued or under way; most_put_off: that may be put off."""
        self._cache = cache
        self._batch_pages = batch_pages
        self._most = most_pages
        self._put_off: deque[Run] = deque()
        self._most_put_off = most_put_off
        self._num_put_off = 0  # pages
        self._queue: deque[Kept] = deque()
        self._under_way: list[Kept] = []
        self._owed: list[PrefixRef] = []  # locks of runs whose end is not under way any more: unlocked with the batch
        self._keys: set[bytes] = set()  # queued or under way
        self.dropped = 0  # pages that were put off, and lost

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._queue) + len(self._under_way)

    @property
    def locks(self) -> list[PrefixRef]:
        """What it has locked in the tree."""
        return [kept.ref for kept in [*self._under_way, *self._queue] if kept.ref is not None] + self._owed

    def add(self, ref: PrefixRef, pages: Sequence[Kept], run: Run) -> None:
        """Hand down pages of `run`, those that the tier lacks, on the path of `ref`, which is locked meanwhile."""
        pages = [kept for kept in pages if kept.key not in self._keys]
        room = max(0, self._most - len(self))
        if len(pages) > room:
            self.put_off(_from(run, pages[room].key))
        pages = pages[:room]
        if not pages:
            return
        self._cache.lock(ref)
        self._queue.extend(pages[:-1])
        self._queue.append(replace(pages[-1], ref=ref, run=run))
        self._keys.update(kept.key for kept in pages)

    def put_off(self, run: Run) -> None:
        """Come back to these pages later."""
        self._put_off.append(run)
        self._num_put_off += run.end - run.begin
        while self._num_put_off > self._most_put_off:
            self.dropped += self._take_put_off()

    def again(self, room: int) -> Run | None:
        """The next run that was put off, cut to what the queue may hold; None while something is queued, and when it
        would lock more than `room` pages."""
        if self._queue or not self._put_off:
            return None
        run = self._put_off[0]
        end = min(run.end, run.begin + self._most - len(self))
        if end <= run.begin or min(end, self._most) > room:
            return None
        self._take_put_off()
        if end < run.end:
            self._put_off.appendleft(replace(run, begin=end))
            self._num_put_off += run.end - end
        return replace(run, end=end)

    def forget_put_off(self) -> None:
        """Nobody wants them any more."""
        self._put_off.clear()
        self._num_put_off = 0

    def _take_put_off(self) -> int:
        run = self._put_off.popleft()
        self._num_put_off -= run.end - run.begin
        return run.end - run.begin

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

    def give_way(self) -> None:
        """Put off what is queued: its memory is needed. The batch under way keeps its locks."""
        is_cut = bool(self._under_way) and self._under_way[-1].ref is None  # the first run has begun
        queue, self._queue = self._queue, deque()
        first: bytes | None = None  # of the run
        for kept in queue:
            self._keys.discard(kept.key)
            first = first or kept.key
            if kept.ref is None or kept.run is None:
                continue
            self.put_off(_from(kept.run, first))
            first = None
            if is_cut:
                self._owed.append(kept.ref)
                is_cut = False
            else:
                self._cache.unlock(kept.ref)


def _from(run: Run, key: bytes) -> Run:
    """The rest of it, this page being the first."""
    return replace(run, begin=next(i for i in range(run.begin, run.end) if run.names[i] == key))
