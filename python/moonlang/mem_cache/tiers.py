"""The tiers below the device pool: which pages go down to host memory and to the store, and which come back up.

Lower tiers know pages by their keys (`core.page_key`), not by tree nodes. Coming up, a page is loaded into a lease like
any other and enters the tree; a request that waited for it then finds it there by the ordinary match. So nothing but
this file knows that tiers exist, and every failure of a tier is a shorter match.

    waiting request --want--> Fetch: promote what the host has, ask the store for what follows, load what it has
    share, admission or memory pressure --keep--> Keeper: demote to the host, save to the store

A request waits for its fetch no longer than computing the same tokens would take (and than the prefetch policy allows);
a fetch whose request went ahead still ends in the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Demote, HostOp, Load, Probe, Promote, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome
from moonlang.mem_cache.host import HostDirectory
from moonlang.mem_cache.keeper import Keeper, Kept
from moonlang.mem_cache.known import Known
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.rates import Rate

_COST_TOKENS = 2048  # a page so far into a prompt costs about twice as much to compute as the first: attention grows
_LOOK_SHARE = 20  # asking the store may delay a request by this fraction of what computing would take
_FETCH_SHARE = 2  # fetches may hold this fraction of the device pool
_TEND_NS = 20_000_000  # at most so often: it looks at every leaf of the tree
_FREE_SHARE = 8  # write_back hands pages down when less than this fraction of the device pool is free


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Bounds and policies; times in nanoseconds. host_slots 0: no host tier."""

    host_slots: int = 0
    store: bool = False
    write_policy: str = "write_through"  # write_through_selective: at the second use; write_back: when room gets short
    prefetch_policy: str = "timeout"  # best_effort: never wait for the store; wait_complete: until it has answered
    threshold_tokens: int = 256  # the store is not asked for fewer
    timeout_ns: int = 1_000_000_000
    timeout_ki_token_ns: int = 250_000_000
    batch_pages: int = 64


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; all zero without lower tiers. Totals count from the start of the process, in tokens.

    misses: how often the store brought nothing, by reason. dropped: not handed down because too much was queued.
    """

    host_slots: int = 0
    host_used: int = 0
    fetching: int = 0
    queued_pages: int = 0
    total_host_tokens: int = 0
    total_store_tokens: int = 0
    total_demoted_tokens: int = 0
    total_saved_tokens: int = 0
    total_dropped_tokens: int = 0
    misses: dict[str, int] = {}


@dataclass(slots=True)
class TierTotals:
    """Counters that only grow, in tokens: what came from where, and why the store brought nothing."""

    host_tokens: int = 0
    store_tokens: int = 0
    saved_tokens: int = 0
    demoted_tokens: int = 0
    misses: dict[str, int] = field(default_factory=dict)  # by reason

    def miss(self, reason: str) -> None:
        self.misses[reason] = self.misses.get(reason, 0) + 1


@dataclass(slots=True, eq=False)
class Fetch:
    """One prefix on its way up. Page indices count from the prompt's first page.

    at: the first page that the device lacked; host_end: the host has the pages before; end: the store those before.
    """

    tokens: list[int]
    extra_key: str
    keys: list[bytes]
    lease: Lease
    at: int
    host_end: int
    end: int
    patience_ns: int  # nobody waits for it after that
    reason: str = ""  # why the store brings nothing
    started_ns: int = 0
    host_good: int = 0
    store_good: int = 0
    host_pending: bool = False
    store_pending: bool = False

    @property
    def is_done(self) -> bool:
        return not (self.host_pending or self.store_pending)

    @property
    def good(self) -> int:
        """Pages of the prompt that are in place without a gap."""
        if self.at + self.host_good < self.host_end:
            return self.at + self.host_good
        return self.host_end + self.store_good


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the cached prefix of a request came from, in tokens; miss: why the store brought nothing."""

    host: int
    store: int
    miss: str


class Tiers:
    """The driver hands `ops` to the channels and brings every completion back under the number of its op."""

    def __init__(self, config: TierConfig, leases: Leases) -> None:
        if not isinstance(leases.cache, RadixCache):
            raise BugError("Tiers keep what the prefix tree holds; there is none.")
        self.config = config
        self.totals = TierTotals()
        self.has_store = config.store  # a store may be attached and detached while the server runs
        self.host = HostDirectory(config.host_slots)
        self._leases = leases
        self._cache = leases.cache
        self._page_size = leases.page_size
        most = max(config.batch_pages, leases.pool.capacity // _FETCH_SHARE)
        self._down_host = Keeper(self._cache, batch_pages=config.batch_pages, most_pages=most)
        self._down_store = Keeper(self._cache, batch_pages=config.batch_pages, most_pages=most)
        self._known = Known()
        self._fetches: dict[int, Fetch] = {}  # by number of an op under way
        self._saves: dict[int, Keeper] = {}
        self._fetched_pages = 0  # in the leases of fetches
        self._ops: list[tuple[int, HostOp | StoreOp]] = []
        self._sent_ns: dict[int, int] = {}
        self._next_op = 0
        self._tended_ns = -_TEND_NS
        self._compute = Rate()
        self._from_host = Rate()
        self._from_store = Rate()
        self._lookup = Rate()

    # ---- up

    def want(self, tokens: list[int], extra_key: str, keys: PageKeys, limit: int, now_ns: int) -> Fetch | None:
        """Begin to bring up what the lower tiers have of the first `limit` tokens, if that is quicker than computing.

        None when there is nothing to wait for.
        """
        size = self._page_size
        last = limit // size
        at = self._cache.match_length(tokens, extra_key, limit) // size
        if last <= at:
            return None
        names = keys.upto(tokens, last)
        host = self._worth_promoting(self.host.leading(names[at:]))
        reason = self._why_not_ask(names, at + host, now_ns)
        if not host and reason:
            self.totals.miss(reason)
            return None
        prefix = self._cache.match(tokens, extra_key, at * size)
        lease = self._leases.open(prefix)
        if not self._room(host) or not self._leases.grow(lease, (at + host) * size):
            self._leases.close(lease, None)
            self.totals.miss("memory")
            return None
        self._fetched_pages += host
        fetch = Fetch(tokens[: last * size], extra_key, names, lease, at, at + host, at + host, now_ns, reason, now_ns)
        if host:
            slots = self.host.pin(names[at : at + host])
            fetch.host_pending = True
            self._issue(fetch, Promote(slots=slots, pages=tuple(lease.pages[at:])))
        if not reason:
            fetch.store_pending = True
            self._issue(fetch, Probe(keys=tuple(names[at + host :])))
        fetch.patience_ns = now_ns + self._patience_ns(last - at - host)
        return fetch

    def is_holding(self, fetch: Fetch, now_ns: int) -> bool:
        """Whether its request should wait. Copies from the host are always waited for: they take no time."""
        return fetch.host_pending or (fetch.store_pending and now_ns < fetch.patience_ns)

    @property
    def wake_ns(self) -> int | None:
        """When a request stops waiting for the store, if one does."""
        return min((fetch.patience_ns for fetch in self._fetches.values() if fetch.store_pending), default=None)

    @property
    def leases(self) -> list[Lease]:
        """Of the fetches under way."""
        return [fetch.lease for fetch in {id(fetch): fetch for fetch in self._fetches.values()}.values()]

    def origin(self, fetch: Fetch, cached: int) -> Origin:
        """Of a prefix of `cached` tokens that a request with this fetch has found in the device pool."""
        size = self._page_size
        good = min(cached, fetch.good * size)
        store = max(0, good - fetch.host_end * size)
        return Origin(max(0, good - store - fetch.at * size), store, fetch.reason)

    @property
    def is_busy(self) -> bool:
        """Ops are under way whose completions change what can be planned."""
        return bool(self._fetches or self._saves or self._ops)

    def _worth_promoting(self, pages: int) -> int:
        """`pages`, or 0 when computing them is quicker than copying them."""
        loading = self._from_host.estimate_ns(pages)
        if pages and loading and loading > self._compute.estimate_ns(pages * self._page_size):
            self._from_host.relent()
            return 0
        return pages

    def _why_not_ask(self, names: Sequence[bytes], at: int, now_ns: int) -> str:
        """Empty when the store is to be asked for the pages from `at` on."""
        pages = len(names) - at
        if not self.has_store:
            return "off"
        if pages == 0:
            return "complete"
        if pages * self._page_size < self.config.threshold_tokens:
            return "short"
        if self._known.is_absent(names[at], now_ns):
            return "absent"
        computing = self._compute.estimate_ns(pages * self._page_size)
        if computing and self._from_store.estimate_ns(pages) + self._lookup.estimate_ns(1) > computing:
            self._from_store.relent()
            self._lookup.relent()
            return "slow"
        return ""

    def _patience_ns(self, pages: int) -> int:
        tokens = pages * self._page_size
        if self.config.prefetch_policy == "best_effort":
            return 0
        limit = self.config.timeout_ns + self.config.timeout_ki_token_ns * tokens // 1024
        if self.config.prefetch_policy == "wait_complete":
            return limit
        computing = self._compute.estimate_ns(tokens)
        return min(limit, computing // _LOOK_SHARE) if computing else limit

    def _room(self, pages: int) -> bool:
        """Whether fetches may hold so many device pages more; a single one may hold all that it can get."""
        return not self._fetched_pages or self._fetched_pages + pages <= self._leases.pool.capacity // _FETCH_SHARE

    def _probed(self, fetch: Fetch, done: Completion, now_ns: int) -> None:
        """The store has said how much it has: load it, if there is room."""
        names = fetch.keys[fetch.host_end :]
        if done.outcome is not Outcome.OK:
            fetch.reason = "failed"
            return
        for key in names[: done.count]:
            self._known.stored(key)
        for key in names[done.count :]:
            self._known.missed(key, now_ns)
        if not done.count:
            fetch.reason = "absent"
            return
        end = fetch.host_end + done.count
        if not self._room(done.count) or not self._leases.grow(fetch.lease, end * self._page_size):
            fetch.reason = "memory"
            return
        self._fetched_pages += done.count
        fetch.end = end
        fetch.store_pending = True
        loading = max(self._from_store.estimate_ns(done.count), self._compute.estimate_ns(done.count * self._page_size))
        if self.config.prefetch_policy == "timeout" and loading:
            fetch.patience_ns = min(now_ns + loading, fetch.started_ns + self._limit_ns(done.count))
        pages = tuple(fetch.lease.pages[fetch.host_end : end])
        deadline_ns = fetch.started_ns + self._limit_ns(done.count)
        self._issue(fetch, Load(keys=tuple(names[: done.count]), pages=pages, deadline_ns=deadline_ns))

    def _limit_ns(self, pages: int) -> int:
        return self.config.timeout_ns + self.config.timeout_ki_token_ns * pages * self._page_size // 1024

    def _settle(self, fetch: Fetch) -> None:
        """Share what is in place; when nothing is under way any more, the rest goes back."""
        good = fetch.good
        if good > fetch.lease.shared:
            self._leases.share(fetch.lease, fetch.tokens, good * self._page_size, fetch.extra_key, None)
        if fetch.is_done:
            self._fetched_pages -= fetch.end - fetch.at
            self._leases.close(fetch.lease, None)
            if fetch.reason:
                self.totals.miss(fetch.reason)
            # What came from the host goes to the store when another instance may want it, and the other way round.
            self.keep(fetch.tokens, fetch.extra_key, fetch.keys, fetch.at, good)

    # ---- down

    def cached(self, tokens: Sequence[int], extra_key: str, keys: PageKeys, begin: int, end: int) -> None:
        """Pages [begin, end) of a prompt have entered the tree."""
        if self.config.write_policy == "write_through" and end > begin:
            self.keep(tokens, extra_key, keys.upto(tokens, end), begin, end)

    def used(self, tokens: Sequence[int], extra_key: str, keys: PageKeys, end: int) -> None:
        """The first `end` pages of a prompt were found in the tree: they have proved their worth."""
        if self.config.write_policy == "write_through_selective" and end:
            self.keep(tokens, extra_key, keys.upto(tokens, end), 0, end)

    def tend(self, now_ns: int) -> None:
        """Under write_back: when room gets short, hand the coldest pages down before they are evicted."""
        pool, size = self._leases.pool, self._page_size
        if self.config.write_policy != "write_back" or pool.free * _FREE_SHARE >= pool.capacity:
            return
        if now_ns - self._tended_ns < _TEND_NS or len(self._down_host) or len(self._down_store):
            return
        self._tended_ns = now_ns
        for tokens, extra_key in self._cache.coldest(self.config.batch_pages):
            count = len(tokens) // size
            self.keep(tokens, extra_key, PageKeys(size, extra_key).upto(tokens, count), 0, count)

    def keep(self, tokens: Sequence[int], extra_key: str, names: Sequence[bytes], begin: int, end: int) -> None:
        """Hand pages [begin, end) to the tiers that lack them."""
        size = self._page_size
        lacks_host = self.config.host_slots and any(key not in self.host for key in names[begin:end])
        lacks_store = self.has_store and any(not self._known.is_stored(key) for key in names[begin:end])
        if not (lacks_host or lacks_store):
            return
        ref = self._cache.match(tokens, extra_key, end * size)
        pages = self._cache.pages(ref)
        run = [Kept(names[i], pages[i], 1 + i * size // _COST_TOKENS) for i in range(begin, min(end, len(pages)))]
        if lacks_host:
            self._down_host.add(ref, [kept for kept in run if kept.key not in self.host])
        if lacks_store:
            self._down_store.add(ref, [kept for kept in run if not self._known.is_stored(kept.key)])

    def _demote(self) -> None:
        batch = self._down_host.batch()
        if not batch:
            return
        placed: list[tuple[int, int]] = []
        for kept in batch:
            slot = None if kept.key in self.host else self.host.reserve(kept.key, kept.cost)
            if slot is not None:
                placed.append((kept.page, slot))
        if not placed:
            self._down_host.done()
            return
        pages, slots = zip(*placed, strict=True)
        self._issue(self._down_host, Demote(pages=pages, slots=slots))

    def _save(self) -> None:
        batch = self._down_store.batch()
        if batch:
            keys = tuple(kept.key for kept in batch)
            self._issue(self._down_store, Save(keys=keys, pages=tuple(kept.page for kept in batch)))

    # ---- the driver

    def ops(self, now_ns: int) -> list[tuple[int, HostOp | StoreOp]]:
        """What to submit now, each op under its number."""
        self._demote()
        self._save()
        ops, self._ops = self._ops, []
        for number, _ in ops:
            self._sent_ns[number] = now_ns
        return ops

    def completed(self, number: int, op: HostOp | StoreOp, done: Completion, now_ns: int) -> None:
        """The op under this number has ended."""
        taken_ns = now_ns - self._sent_ns.pop(number)
        keeper = self._saves.pop(number, None)
        if keeper is not None:
            self._kept(keeper, op, done)
            return
        fetch = self._fetches.pop(number)
        match op:
            case Promote():
                fetch.host_pending = False
                fetch.host_good = done.count
                self._from_host.sample(done.count, taken_ns)
                self.totals.host_tokens += done.count * self._page_size
                names = fetch.keys[fetch.at : fetch.host_end]
                for key in names[done.count : done.count + 1]:
                    self.host.distrust(key)
                self.host.unpin(names)
            case Probe():
                fetch.store_pending = False
                self._lookup.sample(1, taken_ns)
                self._probed(fetch, done, now_ns)
            case Load():
                fetch.store_pending = False
                fetch.store_good = done.count
                self._from_store.sample(max(1, done.count), taken_ns)
                self.totals.store_tokens += done.count * self._page_size
                if done.count < len(op.keys):
                    fetch.reason = "failed"
                    self._known.missed(op.keys[done.count], now_ns)
            case _:
                raise BugError(f"A fetch has no {type(op).__name__}.")
        self._settle(fetch)

    def computed(self, tokens: int, ns: int) -> None:
        """So long took the forward of so many prompt tokens."""
        self._compute.sample(tokens, ns)

    def stats(self) -> TierStats:
        """For metrics."""
        totals = self.totals
        return TierStats(
            host_slots=self.host.num_slots,
            host_used=len(self.host),
            fetching=len(self._fetches),
            queued_pages=len(self._down_host) + len(self._down_store),
            total_host_tokens=totals.host_tokens,
            total_store_tokens=totals.store_tokens,
            total_demoted_tokens=totals.demoted_tokens,
            total_saved_tokens=totals.saved_tokens,
            total_dropped_tokens=(self._down_host.dropped + self._down_store.dropped) * self._page_size,
            misses=dict(totals.misses),
        )

    def forget(self) -> None:
        """Drop what the host tier holds; the store is shared and keeps its own."""
        self.host.clear()

    def forget_store(self) -> None:
        """The store has been cleared, or is another one."""
        self._known.clear()

    def check(self) -> None:
        """BugError unless the directory of the host adds up."""
        self.host.check(idle=not self.is_busy)

    def _kept(self, keeper: Keeper, op: HostOp | StoreOp, done: Completion) -> None:
        batch = keeper.done()
        if isinstance(op, Save):
            for key in op.keys[: done.count]:
                self._known.stored(key)
            self.totals.saved_tokens += done.count * self._page_size
        elif isinstance(op, Demote):
            placed = set(op.pages)
            names = [kept.key for kept in batch if kept.page in placed]
            for i, key in enumerate(names):
                if i < done.count:
                    self.host.filled(key)
                else:
                    self.host.drop(key)
            self.totals.demoted_tokens += done.count * self._page_size

    def _issue(self, owner: Fetch | Keeper, op: HostOp | StoreOp) -> None:
        number = self._next_op
        self._next_op += 1
        self._ops.append((number, op))
        if isinstance(owner, Keeper):
            self._saves[number] = owner
        else:
            self._fetches[number] = owner
