"""The tiers below the device pool: which pages go down to host memory and to the store, and which come back up.

Lower tiers know pages by their keys (`core.page_key`), not by tree nodes. Coming up, a page is loaded into a lease like
any other and enters the tree; a request that waited for it then finds it there by the ordinary match. So nothing but
this file knows that tiers exist, and every failure of a tier is a shorter match.

    waiting request --want--> Fetch: promote what the host has, ask the store for what follows, load what it has
    share, admission or memory pressure --keep--> Descent: demote to the host, save to the store

What lower tiers hold of the device pool is theirs for convenience. A fetch that finds pages on their way down waits for
them to arrive, within reason. When a running request needs the memory, keepers put off what is queued, and fetches that
wait for room give up.
"""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease, PrefixRef
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import HostOp, Load, Probe, Promote, StoreOp
from moonlang.core.ticket import Completion, Outcome
from moonlang.mem_cache.descent import FREE_SHARE, Descent
from moonlang.mem_cache.fetch import Fetch, Judge, Origin
from moonlang.mem_cache.host import HostDirectory
from moonlang.mem_cache.keeper import Keeper, Run
from moonlang.mem_cache.known import Known
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.tier_settings import TierConfig, TierStats, TierTotals

_FETCH_SHARE = 2  # several fetches may hold this fraction of the device pool; a single one all but FREE_SHARE


class Tiers:
    """The driver hands `ops` to the channels and brings every completion back under the number of its op."""

    def __init__(self, config: TierConfig, leases: Leases) -> None:
        if not isinstance(leases.cache, RadixCache):
            raise BugError("Tiers keep what the prefix tree holds; there is none.")
        self.config = config
        self.totals = TierTotals()
        self.unasked = ""  # why there was nothing to wait for, after the latest `want`
        self.host = HostDirectory(config.host_slots)
        self._leases = leases
        self._cache = leases.cache
        self._page_size = leases.page_size
        leases.lender = self
        self._known = Known()
        self._down = Descent(config, leases, self.host, self._known, self.totals, self._issue)
        self._fetches: dict[int, Fetch] = {}  # by number of an op under way
        self._waiting: list[Fetch] = []  # for room
        self._saves: dict[int, Keeper] = {}
        self._fetched_pages = 0  # in the leases of fetches
        self._ops: list[tuple[int, HostOp | StoreOp]] = []
        self._sent_ns: dict[int, int] = {}
        self._next_op = 0
        self._judge = Judge(config, leases.page_size)

    @property
    def has_store(self) -> bool:
        """A store may be attached and detached while the server runs."""
        return self._down.has_store

    @has_store.setter
    def has_store(self, value: bool) -> None:
        self._down.has_store = value

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
        if not scouts:
            fetch.patience_ns = now_ns + self._judge.look_patience_ns(last - at - host)
        if host:
            fetch.host_pending, fetch.slots = True, self.host.pin(names[at : at + host])
            self._make_room(fetch, host, now_ns)
            if fetch.is_done:  # there will never be room
                self._settle(fetch)
                return fetch
        if scouts or not reason:
            fetch.is_scout, fetch.store_pending = scouts, True
            self._issue(fetch, Probe(keys=tuple(names[at + host :])))
        return fetch

    def is_holding(self, fetch: Fetch, now_ns: int) -> bool:
        """Whether its request should wait. Copies from the host are always waited for: they take no time."""
        if fetch.lacks:
            return now_ns < fetch.room_ns
        return fetch.host_pending or (fetch.store_pending and now_ns < fetch.patience_ns)

    def leave(self, fetch: Fetch) -> None:
        """Its request has gone ahead, or is gone: what is under way still enters the tree, nothing more is read."""
        fetch.is_wanted = False

    def wake_ns(self, now_ns: int) -> int | None:
        """When a request stops waiting for the store or for room, if one does."""
        times = [fetch.patience_ns for fetch in self._fetches.values() if fetch.store_pending]
        times += [fetch.room_ns for fetch in self._waiting]
        return min((time for time in times if time > now_ns), default=None)

    @property
    def leases(self) -> list[Lease]:
        """Of the fetches under way."""
        return [fetch.lease for fetch in dict.fromkeys([*self._fetches.values(), *self._waiting])]

    @property
    def locks(self) -> list[PrefixRef]:
        """Of pages on their way down."""
        return self._down.locks

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
        return bool(self._fetches or self._saves or self._ops or self._waiting)

    @property
    def _most_fetched(self) -> int:
        """Pages that a fetch may hold when it is the only one."""
        capacity = self._leases.pool.capacity
        return capacity - capacity // FREE_SHARE

    def _unasked(self, reason: str) -> None:
        self.totals.miss(reason)
        self.unasked = reason

    def _hold(self, fetch: Fetch, pages: int) -> bool:
        """Let the fetch hold so many device pages more, if there is room."""
        alone = self._fetched_pages == fetch.held
        limit = self._most_fetched if alone else self._leases.pool.capacity // _FETCH_SHARE
        if self._fetched_pages + pages > limit or pages > self._leases.available_pages:
            return False
        if not self._leases.grow(fetch.lease, (len(fetch.lease.pages) + pages) * self._page_size):
            return False
        fetch.held += pages
        self._fetched_pages += pages
        return True

    def _make_room(self, fetch: Fetch, pages: int, now_ns: int) -> None:
        """Go on when there is room for so many pages, now or soon."""
        fetch.lacks, fetch.waits_since_ns = pages, now_ns
        self._waiting.append(fetch)
        if self._hold(fetch, pages):
            self._has_room(fetch, now_ns)
        elif fetch.held + pages > self._most_fetched or not (fetch.slots or now_ns < fetch.patience_ns):
            self._deny(fetch)  # there will never be room, or its request does not wait
        else:
            fetch.room_ns = now_ns + self._judge.room_patience_ns(fetch.end - fetch.good)
            self.totals.waits += 1

    def _look_for_room(self, now_ns: int) -> None:
        """See which fetches need not wait any longer. In the end keepers put off what is queued, as for computing: the
        request needs these pages either way."""
        for fetch in list(self._waiting):
            if fetch.is_wanted and now_ns >= fetch.room_ns:
                self._down.give_way()
            if fetch.is_wanted and self._hold(fetch, fetch.lacks):
                self._has_room(fetch, now_ns)
            elif not fetch.is_wanted or now_ns >= fetch.room_ns:
                self._deny(fetch)
                self._settle(fetch)

    def _has_room(self, fetch: Fetch, now_ns: int) -> None:
        self._waiting.remove(fetch)
        pages, fetch.lacks = fetch.lacks, 0
        if fetch.slots:
            slots, fetch.slots = fetch.slots, ()
            self._issue(fetch, Promote(slots=slots, pages=tuple(fetch.lease.pages[fetch.at :])))
            if fetch.end > fetch.host_end and not fetch.store_pending:  # the store has answered meanwhile
                self._load_next(fetch, now_ns)
            return
        latest_ns = self._latest_ns(fetch)
        if fetch.patience_ns > now_ns:  # it has not waited for the store so far
            fetch.patience_ns = min(fetch.patience_ns + now_ns - fetch.waits_since_ns, latest_ns)
        begin = fetch.host_end + fetch.store_good
        fetch.store_pending = True
        lent, keys = tuple(fetch.lease.pages[begin : begin + pages]), tuple(fetch.keys[begin : begin + pages])
        self._issue(fetch, Load(keys=keys, pages=lent, deadline_ns=latest_ns))

    def _deny(self, fetch: Fetch) -> None:
        """There is no room for it: what it has is all that it gets. To be settled."""
        self._waiting.remove(fetch)
        fetch.lacks, fetch.reason = 0, "memory"
        if fetch.slots:
            self.host.unpin(fetch.keys[fetch.at : fetch.host_end])
            fetch.slots, fetch.host_pending = (), False

    def _latest_ns(self, fetch: Fetch) -> int:
        """The longest that the flags allow it."""
        return fetch.started_ns + self._judge.limit_ns(fetch.end - fetch.host_end)

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
            patience_ns = self._judge.load_patience_ns(done.count)
            fetch.patience_ns = min(now_ns + patience_ns, self._latest_ns(fetch))
        self._load_next(fetch, now_ns)

    def _load_next(self, fetch: Fetch, now_ns: int) -> None:
        """Load the next batch, unless there is none or nobody wants it any more."""
        begin = fetch.host_end + fetch.store_good
        end = min(fetch.end, begin + self._judge.pages_at_once(fetch))
        has_gap = not fetch.host_pending and fetch.good < begin  # the host's part fell short
        if begin == end or has_gap or fetch.lacks or not (fetch.is_wanted or fetch.is_scout):
            return
        self._make_room(fetch, end - begin, now_ns)

    def _loaded(self, fetch: Fetch, op: Load, done: Completion, now_ns: int) -> None:
        fetch.store_good += done.count
        self.totals.store_tokens += done.count * self._page_size
        if done.count == len(op.keys):
            if not fetch.is_scout:
                self._load_next(fetch, now_ns)
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
            self._down.keep(Run(fetch.tokens, fetch.extra_key, fetch.keys, fetch.at, good))

    # ---- down

    def cached(self, tokens: Sequence[int], extra_key: str, keys: PageKeys, begin: int, end: int) -> None:
        """Pages [begin, end) of a prompt have entered the tree."""
        self._down.is_news = True
        if self.config.write_policy == "write_through" and end > begin:
            self._down.keep(Run(tokens, extra_key, keys.upto(tokens, end), begin, end))

    def used(self, tokens: Sequence[int], extra_key: str, keys: PageKeys, end: int) -> None:
        """The first `end` pages of a prompt were found in the tree: they have proved their worth."""
        if self.config.write_policy == "write_through_selective" and end:
            self._down.keep(Run(tokens, extra_key, keys.upto(tokens, end), 0, end))

    def tend(self, now_ns: int) -> None:
        """Under write_back: when room gets short, hand the coldest pages down before they are evicted."""
        if self.config.write_policy == "write_back":
            self._down.keep_coldest(now_ns)

    # ---- the driver

    def ops(self, now_ns: int) -> list[tuple[int, HostOp | StoreOp]]:
        """What to submit now, each op under its number."""
        self._look_for_room(now_ns)
        self._down.go_on(not self._waiting)
        ops, self._ops = self._ops, []
        for number, _ in ops:
            self._sent_ns[number] = now_ns
        return ops

    def completed(self, number: int, op: HostOp | StoreOp, done: Completion, now_ns: int) -> None:
        """The op under this number has ended."""
        taken_ns = now_ns - self._sent_ns.pop(number)
        keeper = self._saves.pop(number, None)
        if keeper is not None:
            self._down.handed(keeper, op, done)
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
                self._judge.looked_up(done.count, taken_ns)
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
        """A running request needs memory: what is queued to go down is put off, and nobody waits for room."""
        for fetch in list(self._waiting):
            self._deny(fetch)
            self._settle(fetch)
        self._down.give_way()

    def stats(self) -> TierStats:
        """For metrics."""
        totals = self.totals
        return TierStats(
            host_slots=self.host.num_slots,
            host_used=len(self.host),
            fetching=len(self._fetches),
            total_waits=totals.waits,
            queued_pages=self._down.queued_pages,
            total_host_tokens=totals.host_tokens,
            total_store_tokens=totals.store_tokens,
            total_demoted_tokens=totals.demoted_tokens,
            total_saved_tokens=totals.saved_tokens,
            total_dropped_tokens=self._down.dropped_pages * self._page_size,
            misses=dict(totals.misses),
        )

    def forget(self) -> None:
        """Drop what the host tier holds; the store is shared and keeps its own."""
        self.host.clear()

    def forget_store(self) -> None:
        """The store has been cleared, or is another one."""
        self._known.clear()
        self._down.forget_store()

    def check(self) -> None:
        """BugError unless the directory of the host adds up."""
        self.host.check(idle=not self.is_busy)

    def _issue(self, owner: Fetch | Keeper, op: HostOp | StoreOp) -> None:
        number = self._next_op
        self._next_op += 1
        self._ops.append((number, op))
        if isinstance(owner, Keeper):
            self._saves[number] = owner
        else:
            self._fetches[number] = owner
