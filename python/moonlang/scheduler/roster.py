"""Who holds what: the queue, the slots, the leases and the plans in flight. Every request that lives is in here.

A request waits in `waiting`, or holds a slot and a lease in `running`; on a decode instance it may hold a lease without
a slot in `arriving`, while its pages are being filled from outside and until a slot is free.
"""

from __future__ import annotations

from collections import deque

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease, PrefixRef
from moonlang.core.page_key import PageKeys
from moonlang.core.plan import SlotStart, StepPlan
from moonlang.core.request import Request, State
from moonlang.mem_cache.leases import Leases
from moonlang.mem_cache.tiers import Tiers
from moonlang.scheduler import policy
from moonlang.scheduler.estimate import NewTokenRatio
from moonlang.scheduler.settings import SchedulerConfig, Totals


class Roster:
    """The moves between queue, slot and lease, each in one place."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.memory = Leases(config.num_pages, config.page_size, radix=config.radix, eviction=config.eviction)
        self.tiers = Tiers(config.tiers, self.memory) if config.tiers is not None else None
        self.waiting: list[Request] = []
        self.running: dict[int, Request] = {}  # by slot, in order of admission
        self.arriving: dict[str, Request] = {}  # by rid, in order of their leases
        self.in_flight: deque[StepPlan] = deque()
        self.slots = list(range(config.max_running - 1, -1, -1))
        self.prefilling: dict[tuple[int, tuple[int, ...]], str] = {}  # a run of tokens being computed -> rid
        self.ratio = NewTokenRatio(config.conservativeness)
        self.totals = Totals()
        self.era = 0  # see StepPlan
        self._next_epoch = 0

    @property
    def is_moving(self) -> bool:
        """Pages are on their way between tiers: memory that comes back without a plan."""
        return self.tiers is not None and self.tiers.is_busy

    # ---- whether there is room

    def has_room(self, request: Request, lease: Lease, pages: int) -> bool:
        """Whether `pages` suffice for `request` and for what those that hold a lease will ask for."""
        held = [*self.running.values(), *self.arriving.values()]
        reserved = sum(self._expected_pages(other, lease_of(other)) for other in held)
        return self._expected_pages(request, lease) + reserved <= pages

    def _expected_pages(self, request: Request, lease: Lease) -> int:
        """Pages that `request` is expected to ask for beyond its lease."""
        reserve = max(self.ratio.reserve(request), min(request.remaining, self.config.reserved_tokens))
        wanted = len(request.tokens) + request.pending + reserve
        return max(0, self.memory.pages_for(wanted) - len(lease.pages))

    # ---- slot and lease

    def start(self, request: Request, lease: Lease, computed: int, now_ns: int) -> SlotStart:
        """Give `request` a slot and the lease. computed: positions whose KV is in the lease's pages already."""
        if request.epoch < 0:
            request.admitted_ns = now_ns
        request.slot = self.slots.pop()
        request.epoch = self._next_epoch
        self._next_epoch += 1
        request.state = State.RUNNING
        request.lease = lease
        request.scheduled = request.computed = computed
        request.admitted = len(request.tokens)
        request.pending = request.sent_pages = 0
        self.running[request.slot] = request
        tokens = tuple(request.tokens)
        return SlotStart(request.slot, request.epoch, request.prompt_len, tokens, request.sampling, request.logprob)

    def vacate(self, request: Request, *, keep: bool = True) -> Lease:
        """Give back the slot. What is computed stays in the tree, unless it cannot be trusted (not `keep`). The lease
        is the caller's: to be closed with `touching`."""
        lease = lease_of(request)
        if keep:
            self.share(request)
        self.stop_prefilling(request)
        del self.running[request.slot]
        self.slots.append(request.slot)
        request.lease, request.slot, request.pending = None, -1, 0
        request.scheduled = request.computed = 0
        return lease

    def leave(self, request: Request, *, keep: bool = True) -> None:
        """Give back slot and lease."""
        lease = self.vacate(request, keep=keep)
        self.memory.close(lease, self.touching(request))

    def share(self, request: Request) -> None:
        """Let others use the computed pages of a running request, in this pool and below."""
        lease = lease_of(request)
        before = lease.shared
        changed = self.memory.share(lease, request.tokens, request.computed, request.extra_key, self.touching(request))
        request.sent_pages = min(request.sent_pages, changed)
        if self.tiers is not None:
            self.tiers.cached(request.tokens, request.extra_key, self._keys(request), before, lease.shared)

    # ---- what lower tiers hold

    def prefetch(self, request: Request, now_ns: int) -> None:
        """Begin to bring up what lower tiers have of a request that has just come."""
        if self.tiers is not None:
            limit = policy.reusable(request)
            request.fetch = self.tiers.want(request.tokens, request.extra_key, self._keys(request), limit, now_ns)
            request.tier_miss = "" if request.fetch is not None else self.tiers.unasked

    def is_fetching(self, request: Request, now_ns: int) -> bool:
        """Whether the request had better wait for what is being brought up."""
        return self.tiers is not None and request.fetch is not None and self.tiers.is_holding(request.fetch, now_ns)

    def found(self, request: Request, cached: int) -> None:
        """Note at the first admission what the cache has brought, and from where."""
        request.cached_tokens = cached
        self.totals.prompt_tokens += request.prompt_len
        self.totals.cached_tokens += cached
        if self.tiers is None:
            return
        self.tiers.used(request.tokens, request.extra_key, self._keys(request), cached // self.config.page_size)
        if request.fetch is not None:
            self.tiers.leave(request.fetch)
            origin = self.tiers.origin(request.fetch, cached)
            request.host_tokens, request.storage_tokens, request.tier_miss = origin.host, origin.store, origin.miss

    def _keys(self, request: Request) -> PageKeys:
        if request.keys is None:
            request.keys = PageKeys(self.config.page_size, request.extra_key)
        return request.keys

    def touching(self, request: Request) -> int | None:
        """The newest plan in flight with a row of this request."""
        in_flight = self.in_flight and request.last_plan >= self.in_flight[0].plan_id
        return request.last_plan if in_flight else None

    def retract(self, request: Request) -> None:
        """Take slot and pages away and queue the request again with its output; its rows in flight become void."""
        if request.slot < 0:
            self.unlease(request)
        else:
            self.leave(request)
        self._queue_again(request)
        self.ratio.tighten(self.running.values())

    def lose_memory(self) -> None:
        """What was computed is gone: queue again whoever runs, with its output, and forget all prefixes."""
        self.era += 1
        for request in list(self.running.values()):
            self.leave(request, keep=False)
            self._queue_again(request)
        self.memory.cache.evict(self.config.num_pages)

    def _queue_again(self, request: Request) -> None:
        """With its output, which is computed again as a part of the prompt."""
        request.state = State.WAITING
        request.retractions += 1
        self.totals.retractions += 1
        self.waiting.append(request)

    def unlease(self, request: Request) -> None:
        """Take the lease of a request that has arrived but has no slot yet; nobody writes to its pages."""
        del self.arriving[request.rid]
        self.memory.close(lease_of(request), None)
        request.lease = None

    # ---- runs of tokens that are being computed

    def prefix_key(self, request: Request, prefix: PrefixRef) -> tuple[int, tuple[int, ...]] | None:
        """Names the run of tokens behind the cached prefix, if it is long enough to be worth waiting for."""
        run = self.config.prefix_wait_tokens
        if not self.config.radix or policy.reusable(request) - prefix.tokens < run:
            return None
        return prefix.node.id, tuple(request.tokens[prefix.tokens : prefix.tokens + run])

    def stop_prefilling(self, request: Request) -> None:
        """The run that `request` computes is in the tree, or will not be computed."""
        if self.prefilling:
            self.prefilling = {key: rid for key, rid in self.prefilling.items() if rid != request.rid}

    def check(self, others: list[Lease], *, idle: bool) -> None:
        """BugError unless requests, slots, leases, tree and pool agree. others: leases of no request in here."""
        held = [*self.running.values(), *self.arriving.values()]
        leases = [*(lease_of(request) for request in held), *others]
        if self.tiers is not None:
            leases += self.tiers.leases
            self.tiers.check()
        self.memory.check(leases, idle=idle and not self.is_moving)
        for request in self.running.values():
            covered = len(lease_of(request).pages) * self.config.page_size
            if not request.computed <= request.scheduled <= covered:
                raise BugError(
                    f"{request.rid}: {request.computed} computed, {request.scheduled} scheduled, {covered} held."
                )
        if len(self.slots) + len(self.running) != self.config.max_running:
            raise BugError(
                f"{len(self.slots)} slots are free and {len(self.running)} taken of {self.config.max_running}."
            )


def lease_of(request: Request) -> Lease:
    """The lease of a request that must have one."""
    lease = request.lease
    if lease is None:
        raise BugError(f"Request {request.rid} has no lease.")
    return lease
