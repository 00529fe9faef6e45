"""Leases: the page tables of running requests, over one pool and one prefix cache.

A lease begins as the pages of a locked prefix, grows page by page, shares what is computed with the tree, and closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease, PrefixRef
from moonlang.mem_cache.eviction import ORDERS
from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.pool import Owner, PagePool
from moonlang.mem_cache.radix import RadixCache


class Lender(Protocol):
    """Somebody who locks cached pages for convenience."""

    def give_way(self) -> None:
        """Unlock what can be unlocked now: memory is needed."""
        ...


class Leases:
    """Grants memory. A `plan` argument names the newest plan in flight that may touch the pages, None if none does."""

    def __init__(self, num_pages: int, page_size: int, *, radix: bool, eviction: str) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages)
        self.cache = RadixCache(self.pool, page_size, ORDERS[eviction]) if radix else NoCache()
        self.lender: Lender | None = None

    @property
    def capacity_tokens(self) -> int:
        return self.pool.capacity * self.page_size

    @property
    def available_pages(self) -> int:
        """Pages that can be had now: free ones and those the tree would give up."""
        return self.pool.free + self.cache.evictable_pages

    @property
    def coming_pages(self) -> int:
        """Pages that can be had now or when the plans in flight are done."""
        return self.available_pages + self.pool.count(Owner.PINNED)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that hold `tokens` positions."""
        return -(-tokens // self.page_size)

    def open(self, prefix: PrefixRef) -> Lease:
        """A lease on a cached prefix, which stays locked until the lease is closed."""
        self.cache.lock(prefix)
        pages = self.cache.pages(prefix)
        return Lease(prefix, pages, len(pages))

    def grow(self, lease: Lease, positions: int) -> bool:
        """Make the lease cover `positions`, evicting if it must; False, and no change, when pages are short."""
        missing = self.pages_for(positions) - len(lease.pages)
        if missing <= 0:
            return True
        lacking = missing - self.pool.free
        if lacking > self.cache.evictable_pages:
            self.call_in()
        if lacking > 0 and (lacking > self.cache.evictable_pages or self.cache.evict(lacking) < lacking):
            return False
        lease.pages += self.pool.take(missing)
        return True

    def call_in(self) -> None:
        """Have pages unlocked that are locked for convenience."""
        if self.lender is not None:
            self.lender.give_way()

    def share(self, lease: Lease, tokens: Sequence[int], computed: int, extra_key: str, plan: int | None) -> int:
        """Put the whole pages among the first `computed` tokens into the tree, and lease the tree's pages instead.

        Where another request was faster the tree keeps its pages and this lease gives up its own; not while they are
        lent, then it must be called again later. Returns the first entry of the page table that changed,
        len(lease.pages) if none did.
        """
        count = computed // self.page_size
        if count <= lease.shared:
            return len(lease.pages)
        if lease.lent and self.cache.match_length(tokens, extra_key, computed) > lease.shared * self.page_size:
            return len(lease.pages)
        done = self.cache.insert(tokens[: count * self.page_size], lease.pages[:count], extra_key)
        if len(done.pages) < count:  # the cache does not keep anything
            return len(lease.pages)
        changed = [i for i in range(lease.shared, count) if lease.pages[i] != done.pages[i]]
        self._give_back([lease.pages[i] for i in changed], plan)
        lease.pages[:count] = done.pages
        self.cache.lock(done.ref)
        self.cache.unlock(lease.prefix)
        lease.prefix, lease.shared = done.ref, count
        return changed[0] if changed else len(lease.pages)

    def close(self, lease: Lease, plan: int | None) -> None:
        """End the lease: its own pages become free, at once or when `plan` has run; the tree keeps what was shared."""
        self._give_back(lease.pages[lease.shared :], plan)
        self.cache.unlock(lease.prefix)
        lease.pages, lease.shared = [], 0

    def quarantine(self, lease: Lease) -> list[int]:
        """End a lease whose own pages a peer may still write to: they belong to nobody until `acquit`."""
        pages = lease.pages[lease.shared :]
        self.pool.quarantine(pages)
        self.cache.unlock(lease.prefix)
        lease.pages, lease.shared = [], 0
        return pages

    def acquit(self, pages: Sequence[int]) -> None:
        """No write to these pages is under way any more: they become free."""
        self.pool.release(pages, Owner.QUARANTINED)

    def check(self, open_leases: Sequence[Lease], *, idle: bool) -> None:
        """BugError unless pool, tree and the open leases agree: O(everything)."""
        self.pool.check()
        self.cache.check()
        own = [page for lease in open_leases for page in lease.pages[lease.shared :]]
        if len(set(own)) != len(own) or len(own) != self.pool.count(Owner.LEASED):
            raise BugError(f"{len(own)} pages are in leases, {self.pool.count(Owner.LEASED)} are leased.")
        held = self.pool.capacity - self.available_pages - self.pool.count(Owner.QUARANTINED)
        if idle and held:
            raise BugError(f"{held} pages are held although nothing runs.")

    def _give_back(self, pages: list[int], plan: int | None) -> None:
        if plan is None:
            self.pool.release(pages, Owner.LEASED)
        else:
            self.pool.retire(pages, plan)
