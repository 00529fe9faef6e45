"""The way down: pages of the prefix tree that host memory or the store lack are handed to them."""

from __future__ import annotations

from collections.abc import Callable

from moonlang.core.lease import PrefixRef
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Demote, HostOp, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome
from moonlang.mem_cache.host import HostDirectory
from moonlang.mem_cache.keeper import Keeper, Kept, Run
from moonlang.mem_cache.known import Known
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.tier_settings import TierConfig, TierTotals

FREE_SHARE = 8  # this fraction of the device pool is better free: write_back hands pages down then, and what is queued
# for one tier, or held by one fetch, leaves so much
_COST_TOKENS = 2048  # a page so far into a prompt costs about twice as much to compute as the first: attention grows
_TEND_NS = 20_000_000  # the coldest pages are looked for at most so often: it looks at every leaf of the tree


class Descent:
    """A Keeper for each tier. issue: takes an op, whose completion is to come back to `handed` with its keeper."""

    def __init__(
        self,
        config: TierConfig,
        leases: Leases,
        host: HostDirectory,
        known: Known,
        totals: TierTotals,
        issue: Callable[[Keeper, HostOp | StoreOp], None],
    ) -> None:
        assert isinstance(leases.cache, RadixCache)
        self.has_store = config.store
        self.is_news = True  # something has been computed since the coldest were kept: else it would go round for ever
        self._config = config
        self._leases = leases
        self._cache = leases.cache
        self._host = host
        self._known = known
        self._totals = totals
        self._issue = issue
        self._tended_ns = -_TEND_NS
        capacity = leases.pool.capacity
        bounds = {
            "batch_pages": config.batch_pages,
            "most_pages": max(config.batch_pages, capacity - capacity // FREE_SHARE),
            "most_put_off": capacity,
        }
        self._to_host = Keeper(leases.cache, **bounds)
        self._to_store = Keeper(leases.cache, **bounds)

    @property
    def locks(self) -> list[PrefixRef]:
        return self._to_host.locks + self._to_store.locks

    @property
    def queued_pages(self) -> int:
        return len(self._to_host) + len(self._to_store)

    @property
    def dropped_pages(self) -> int:
        return self._to_host.dropped + self._to_store.dropped

    # ---- what is to go down

    def keep(self, run: Run) -> None:
        """Hand these pages to the tiers that lack them."""
        names = run.names[run.begin : run.end]
        lacks_host = self._config.host_slots and any(key not in self._host for key in names)
        lacks_store = self.has_store and any(not self._known.is_stored(key) for key in names)
        if lacks_host:
            self._queue(self._to_host, run)
        if lacks_store:
            self._queue(self._to_store, run)

    def keep_coldest(self, now_ns: int) -> None:
        """Hand down the coldest pages when room gets short, before they are evicted."""
        pool, size = self._leases.pool, self._leases.page_size
        if pool.free * FREE_SHARE >= pool.capacity or not self.is_news or self.queued_pages:
            return
        if now_ns - self._tended_ns < _TEND_NS:
            return
        self._tended_ns, self.is_news = now_ns, False
        for tokens, extra_key in self._cache.coldest(self._config.batch_pages):
            count = len(tokens) // size
            self.keep(Run(tokens, extra_key, PageKeys(size, extra_key).upto(tokens, count), 0, count))

    def give_way(self) -> None:
        """What is queued is put off."""
        self._to_host.give_way()
        self._to_store.give_way()

    def forget_store(self) -> None:
        """It is another one, or empty."""
        self._to_store.forget_put_off()

    # ---- going there

    def go_on(self, may_lock: bool) -> None:
        """Issue what comes next. may_lock: nobody waits for room, so what was put off may be queued again, one run at a
        time and where enough pages are left."""
        if may_lock:
            for keeper in (self._to_host, self._to_store):
                run = keeper.again(self._leases.available_pages - self._leases.pool.capacity // FREE_SHARE)
                if run is not None:
                    self._queue(keeper, run)
        self._demote()
        self._save()

    def handed(self, keeper: Keeper, op: HostOp | StoreOp, done: Completion) -> None:
        """A batch has arrived, or as much of it as could."""
        batch = keeper.done()
        if isinstance(op, Save):
            if done.outcome is not Outcome.OK:
                self._known.forget_stored()
            for key in op.keys[: done.count]:
                self._known.stored(key)
            self._totals.saved_tokens += done.count * self._leases.page_size
        elif isinstance(op, Demote):
            placed = set(op.pages)
            names = [kept.key for kept in batch if kept.page in placed]
            for i, key in enumerate(names):
                if i < done.count:
                    self._host.filled(key)
                else:
                    self._host.drop(key)
            self._totals.demoted_tokens += done.count * self._leases.page_size

    def _queue(self, keeper: Keeper, run: Run) -> None:
        """Queue what the keeper's tier lacks of these pages, and the tree has."""
        size, names = self._leases.page_size, run.names
        has = self._host.__contains__ if keeper is self._to_host else self._known.is_stored
        ref = self._cache.match(run.tokens, run.extra_key, run.end * size)
        pages = self._cache.pages(ref)
        there = range(run.begin, min(run.end, len(pages)))
        lacking = [Kept(names[i], pages[i], 1 + i * size // _COST_TOKENS) for i in there if not has(names[i])]
        keeper.add(ref, lacking, run)
        keeper.dropped += sum(not has(name) for name in names[max(run.begin, len(pages)) : run.end])

    def _demote(self) -> None:
        batch = self._to_host.batch()
        if not batch:
            return
        placed: list[tuple[int, int]] = []
        for kept in batch:
            slot = None if kept.key in self._host else self._host.reserve(kept.key, kept.cost)
            if slot is not None:
                placed.append((kept.page, slot))
        if not placed:
            self._to_host.done()
            return
        pages, slots = zip(*placed, strict=True)
        self._issue(self._to_host, Demote(pages=pages, slots=slots))

    def _save(self) -> None:
        batch = self._to_store.batch()
        if batch:
            keys = tuple(kept.key for kept in batch)
            self._issue(self._to_store, Save(keys=keys, pages=tuple(kept.page for kept in batch)))
