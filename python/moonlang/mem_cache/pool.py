"""The page ledger. Every page has exactly one owner at any time; the ledger knows no bytes, only numbers.

    free --take--> leased --adopt--> cached
    leased | cached --release--> free
    leased --retire(plan)--> pinned --complete(plan)--> free
    leased --quarantine--> quarantined --release--> free

A page that a plan in flight only reads may be freed and given to anybody: the row that reads it is void. A page that a
plan may still write to never is, neither to a request nor to a peer that writes past the order of plans: `retire` holds
it back until the plan is complete. The other way round, pages that a peer may still write to are quarantined.

Page 0 is never handed out: page tables are padded with it, so its content must stay finite whatever requests do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum

from moonlang.base.errors import BugError


class Owner(IntEnum):
    FREE = 0
    LEASED = 1  # by one running request
    CACHED = 2  # by the prefix tree
    PINNED = 3  # by a plan in flight that may still write to it
    QUARANTINED = 4  # by a peer that may still write to it


class PagePool:
    """`num_pages` pages with ids 0 .. num_pages - 1, of which all but page 0 can be taken."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise BugError(f"A pool needs at least 2 pages, got {num_pages}.")
        self.num_pages = num_pages
        self._owner = bytearray(num_pages)
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the lowest ids go first
        self._counts = [num_pages - 1, *[0] * (len(Owner) - 1)]
        self._pinned: deque[tuple[int, list[int]]] = deque()  # (plan id, pages), plan ids ascending

    @property
    def capacity(self) -> int:
        """Pages that can be taken when nothing is."""
        return self.num_pages - 1

    @property
    def free(self) -> int:
        return self._counts[Owner.FREE]

    def count(self, owner: Owner) -> int:
        return self._counts[owner]

    def owner(self, page: int) -> Owner:
        return Owner(self._owner[page])

    def take(self, count: int) -> list[int]:
        """`count` pages for a lease. The caller has made sure that so many are free."""
        if count > len(self._free):
            raise BugError(f"{count} pages were taken, {len(self._free)} are free.")
        pages = [self._free.pop() for _ in range(count)]
        self._move(pages, Owner.FREE, Owner.LEASED)
        return pages

    def adopt(self, pages: Sequence[int]) -> None:
        """The tree takes over pages of a lease."""
        self._move(pages, Owner.LEASED, Owner.CACHED)

    def release(self, pages: Sequence[int], owner: Owner) -> None:
        """Pages of `owner` (any but PINNED) that no plan in flight touches become free."""
        self._move(pages, owner, Owner.FREE)
        self._free.extend(reversed(pages))

    def quarantine(self, pages: Sequence[int]) -> None:
        """Leased pages whose request is gone while a peer may still write to them: free when released."""
        self._move(pages, Owner.LEASED, Owner.QUARANTINED)

    def retire(self, pages: list[int], plan_id: int) -> None:
        """Leased pages whose request is gone while plan `plan_id` may still write to them: free when it is complete."""
        if not pages:
            return
        self._move(pages, Owner.LEASED, Owner.PINNED)
        if self._pinned and self._pinned[-1][0] > plan_id:
            # Requests end in any order; keep the queue sorted so that `complete` looks at its head only.
            at = next(i for i, (other, _) in enumerate(self._pinned) if other > plan_id)
            self._pinned.insert(at, (plan_id, pages))
        else:
            self._pinned.append((plan_id, pages))

    def complete(self, plan_id: int) -> None:
        """Plans up to `plan_id` have run: the pages that waited for them become free."""
        while self._pinned and self._pinned[0][0] <= plan_id:
            _, pages = self._pinned.popleft()
            self._move(pages, Owner.PINNED, Owner.FREE)
            self._free.extend(reversed(pages))

    def check(self) -> None:
        """BugError unless the ledger adds up: O(pages)."""
        counts = [self._owner.count(owner) for owner in Owner]
        counts[Owner.FREE] -= 1  # page 0
        pinned = sum(len(pages) for _, pages in self._pinned)
        if counts != self._counts or counts[Owner.FREE] != len(self._free) or counts[Owner.PINNED] != pinned:
            raise BugError(f"The page ledger does not add up: {counts} counted, {self._counts} kept, {pinned} pinned.")
        if len(set(self._free)) != len(self._free):
            raise BugError("A page is free twice.")

    def _move(self, pages: Sequence[int], source: Owner, target: Owner) -> None:
        owner = self._owner
        for page in pages:
            if owner[page] != source or page == 0:
                raise BugError(f"Page {page} belongs to {Owner(owner[page]).name}, not to {source.name}.")
            owner[page] = target
        self._counts[source] -= len(pages)
        self._counts[target] += len(pages)
