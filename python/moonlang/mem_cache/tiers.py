"""The tiers below the device pool: which pages go down to host memory and to the store, and which come back up.

Lower tiers know pages by their keys (`core.page_key`), not by tree nodes. Coming up, a page is loaded into a lease like
any other and enters the tree; a request that waited for it then finds it there by the ordinary match. So nothing but
this file knows that tiers exist, and every failure of a tier is a shorter match.

    waiting request --want--> Fetch: promote what the host has, ask the store for what follows, load what it has
    share, admission or memory pressure --keep--> Keeper: demote to the host, save to the store

What lower tiers hold of the device pool is theirs for convenience: fetches begin only where there is room, and keepers
let go of what is queued when a request needs the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease, PrefixRef
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Demote, HostOp, Load, Probe, Promote, Save, StoreOp
from moonlang.core.ticket import Completion, Outcome
from moonlang.mem_cache.fetch import Fetch, Judge, Origin
from moonlang.mem_cache.host import HostDirectory
from moonlang.mem_cache.keeper import Keeper, Kept
from moonlang.mem_cache.known import Known
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.tier_settings import TierConfig, TierStats, TierTotals

_COST_TOKENS = 2048  # a page so far into a prompt costs about twice as much to compute as the first: attention grows
_FETCH_SHARE = 2  # several fetches may hold this fraction of the device pool; a single one all but _FREE_SHARE
_KEEP_SHARE = 2  # and what is queued for one tier this one
_TEND_NS = 20_000_000  # at most so often: it looks at every leaf of the tree
_FREE_SHARE = 8  # this fraction of the device pool is better free; when it is not, write_back hands pages down


class Tiers:
    """The driver hands `ops` to the channels and brings every completion back under the number of its op."""

    def __init__(self, config: TierConfig, leases: Leases) -> None:
        if not isinstance(leases.cache, RadixCache):
            raise BugError("Tiers keep what the prefix tree holds; there is none.")
        self.config = config
        self.totals = TierTotals()
        self.unasked = ""  # why there was nothing to wait for, after the latest `want`
        self.has_store = config.store  # a store may be attached and detached while the server runs
        self.host = HostDirectory(config.host_slots)
        self._leases = leases
        self._cache = leases.cache
        self._page_size = leases.page_size
        leases.lender = self
        most = max(config.batch_pages, leases.pool.capacity // _KEEP_SHARE)
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
        self._is_news = True  # something has been computed since it was tended: else it would go round for ever
        self._judge = Judge(config, leases.page_size)

    # ---- up

    def want(self, tokens: list[int], extra_key: str, keys: PageKeys, limit: int, now_ns: int) -> Fetch | None:
        """Begin to bring up what the lower tiers have of the first `limit` tokens, if that is quicker than computing.

        None when there is nothing to wait for; `unasked` then says why.
        """
        self.unasked = "complete"
        size = self._page_size
        last = limit // size
        at = self._cache.match_length(tokens, extra_key, limit) // size
        if last <= at:
            return None
        names = keys.upto(tokens, last)
        host = self._judge.worth_promoting(self.host.leading(names[at:]))
        reason = self._judge.why_not_ask(names, at + host, self._known, now_ns) if self.has_store else "off"
        scouts = reason == "slow" and self._judge.may_scout(now_ns)
        if reason and not host and not scouts:
            return self._unasked(reason)
        lease = self._leases.open(self._cache.match(tokens, extra_key, at * size))
        fetch = Fetch(tokens[: last * size], extra_key, names, lease, at, at + host, at + host, now_ns, reason, now_ns)
        if not self._hold(fetch, host):
            self._leases.close(lease, None)
            return self._unasked("memory")
        if host:
            slots = self.host.pin(names[at : at + host])
            fetch.host_pending = True
            self._issue(fetch, Promote(slots=slots, pages=tuple(lease.pages[at:])))
        if scouts or not reason:
            fetch.is_scout, fetch.store_pending = scouts, True
            self._issue(fetch, Probe(keys=tuple(names[at + host :])))
        if not scouts:
            fetch.patience_ns = now_ns + self._judge.look_patience_ns(last - at - host)
        return fetch

    def is_holding(self, fetch: Fetch, now_ns: int) -> bool:
        """Whether its request should wait. Copies from the host are always waited for: they take no time."""
        return fetch.host_pending or (fetch.store_pending and now_ns < fetch.patience_ns)

    def leave(self, fetch: Fetch) -> None:
        """Its request has gone ahead, or is gone: what is under way still enters the tree, nothing more is read."""
        fetch.is_wanted = False

    def wake_ns(self, now_ns: int) -> int | None:
        """When a request stops waiting for the store, if one does."""
        times = [fetch.patience_ns for fetch in self._fetches.values() if fetch.store_pending]
        return min((time for time in times if time > now_ns), default=None)

    @property
    def leases(self) -> list[Lease]:
        """Of the fetches under way."""
        return [fetch.lease for fetch in dict.fromkeys(self._fetches.values())]

    @property
    def locks(self) -> list[PrefixRef]:
        """Of pages on their way down."""
        return self._down_host.locks + self._down_store.locks

    def origin(self, fetch: Fetch, cached: int) -> Origin:
        """Of a prefix of `cached` tokens that a request with this fetch has found in the device pool."""
        size = self._page_size
        good = min(cached, fetch.good * size)
        store = max(0, good - fetch.host_end * size)
        reason = fetch.reason or ("slow" if fetch.store_pending else "")  # it went ahead without the rest
        return Origin(max(0, good - store - fetch.at * size), store, reason)

    @property
    def is_busy(self) -> bool:
        """Ops are under way whose completions change what can be planned."""
        return bool(self._fetches or self._saves or self._ops)

    def _unasked(self, reason: str) -> None:
        self.totals.miss(reason)
        self.unasked = reason

    def _hold(self, fetch: Fetch, pages: int) -> bool:
        """Let the fetch hold so many device pages more, if there is room."""
        capacity = self._leases.pool.capacity
        alone = self._fetched_pages == fetch.held
        limit = capacity - capacity // _FREE_SHARE if alone else capacity // _FETCH_SHARE
        if self._fetched_pages + pages > limit:
            return False
        if alone and pages > self._leases.available_pages:
            self.give_way()  # as for computing: the request needs these pages either way
        if pages > self._leases.available_pages:
            return False
        if not self._leases.grow(fetch.lease, (len(fetch.lease.pages) + pages) * self._page_size):
            return False
        fetch.held += pages
        self._fetched_pages += pages
        return True

    def _probed(self, fetch: Fetch, done: Completion, now_ns: int) -> None:
        """The store has said how much it has: begin to load it."""
        names = fetch.keys[fetch.host_end :]
        if done.outcome is not Outcome.OK:
            self._store_failed(fetch)
            return
        for key in names[: done.count]:
            self._known.stored(key)
        for key in names[done.count :]:  # those behind the first are written again then, so that no gap remains
            self._known.missed(key, now_ns)
        if not done.count:
            fetch.reason = "absent"
            return
        fetch.end = fetch.host_end + done.count
        if not fetch.is_scout and fetch.patience_ns > now_ns:
            latest_ns = fetch.started_ns + self._judge.limit_ns(done.count)
            fetch.patience_ns = min(now_ns + self._judge.load_patience_ns(done.count), latest_ns)
        self._load_next(fetch)

    def _load_next(self, fetch: Fetch) -> None:
        """Load the next batch, unless there is none or nobody wants it any more."""
        begin = fetch.host_end + fetch.store_good
        end = min(fetch.end, begin + self._judge.pages_at_once(fetch))
        has_gap = not fetch.host_pending and fetch.good < begin  # the host's part fell short
        if begin == end or has_gap or not (fetch.is_wanted or fetch.is_scout):
            return
        if not self._hold(fetch, end - begin):
            fetch.reason = "memory"
            return
        deadline_ns = fetch.started_ns + self._judge.limit_ns(fetch.end - fetch.host_end)
        pages = tuple(fetch.lease.pages[begin:end])
        fetch.store_pending = True
        self._issue(fetch, Load(keys=tuple(fetch.keys[begin:end]), pages=pages, deadline_ns=deadline_ns))

    def _loaded(self, fetch: Fetch, op: Load, done: Completion, now_ns: int) -> None:
        fetch.store_good += done.count
        self.totals.store_tokens += done.count * self._page_size
        if done.count == len(op.keys):
            if not fetch.is_scout:
                self._load_next(fetch)
            return
        self._store_failed(fetch)
        self._known.missed(op.keys[done.count], now_ns)

    def _store_failed(self, fetch: Fetch) -> None:
        """Who has failed may have lost what it had: nothing is believed to be there."""
        fetch.reason = "failed"
        self._known.forget_stored()

    def _settle(self, fetch: Fetch) -> None:
        """Share what is in place; when nothing is under way any more, the rest goes back."""
        good = fetch.good
        if good > fetch.lease.shared:
            self._leases.share(fetch.lease, fetch.tokens, good * self._page_size, fetch.extra_key, None)
        if fetch.is_done:
            self._fetched_pages -= fetch.held
            self._leases.close(fetch.lease, None)
            if fetch.reason:
                self.totals.miss(fetch.reason)
            # What came from the host goes to the store when another instance may want it, and the other way round.
            self.keep(fetch.tokens, fetch.extra_key, fetch.keys, fetch.at, good)

    # ---- down

    def cached(self, tokens: Sequence[int], extra_key: str, keys: PageKeys, begin: int, end: int) -> None:
        """Pages [begin, end) of a prompt have entered the tree."""
        self._is_news = True
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
        if not self._is_news or now_ns - self._tended_ns < _TEND_NS or len(self._down_host) or len(self._down_store):
            return
        self._tended_ns, self._is_news = now_ns, False
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
                self._judge.promoted(done.count, taken_ns)
                self.totals.host_tokens += done.count * self._page_size
                names = fetch.keys[fetch.at : fetch.host_end]
                for key in names[done.count : done.count + 1]:
                    self.host.distrust(key)
                self.host.unpin(names)
            case Probe():
                fetch.store_pending = False
                self._judge.looked_up(taken_ns)
                self._probed(fetch, done, now_ns)
            case Load():
                fetch.store_pending = False
                if done.outcome is not Outcome.CANCELLED:
                    self._judge.loaded(done.count, taken_ns)
                self._loaded(fetch, op, done, now_ns)
            case _:
                raise BugError(f"A fetch has no {type(op).__name__}.")
        self._settle(fetch)

    def computed(self, tokens: int, ns: int) -> None:
        """So long took the forward of so many prompt tokens."""
        self._judge.computed(tokens, ns)

    def give_way(self) -> None:
        """A request needs memory: what is queued to go down is not kept after all."""
        self._down_host.drop_queued()
        self._down_store.drop_queued()

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
            if done.outcome is not Outcome.OK:
                self._known.forget_stored()
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
