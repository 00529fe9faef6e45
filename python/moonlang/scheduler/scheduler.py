"""The scheduler: requests in, plans out, results in, tokens out. Pure; one object owns every request and every page.

This file is a request's way in and out. `roster` is who holds what, `planner` makes the plans, `peers` is the half of
prefill/decode disaggregation that this instance plays, if any.
"""

from __future__ import annotations

import msgspec

from moonlang.base.errors import BugError
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.plan import Row, RowResult, StepPlan, StepResult
from moonlang.core.request import Finish, Request, State
from moonlang.core.sampling import GrammarSpec
from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.radix import RadixCache
from moonlang.mem_cache.tier_settings import TierStats
from moonlang.mem_cache.tiers import Tiers
from moonlang.scheduler.decode_side import DecodeSide
from moonlang.scheduler.grammar_gate import GrammarGate
from moonlang.scheduler.intake import make_request, refusal
from moonlang.scheduler.outbox import Outbox
from moonlang.scheduler.pair_side import NoPeers, PairSide
from moonlang.scheduler.planner import Planner
from moonlang.scheduler.prefill_side import PrefillSide
from moonlang.scheduler.roster import Roster
from moonlang.scheduler.settings import PlanReport, SchedulerConfig, SchedulerStats


class Scheduler:
    """The driver calls `expire` and then `plan` until it returns None, and `commit` for every result, in order.

    With peers it passes on what it hears, `peers.heard`, `peers.transferred` and `peers.progress`, before all that, and
    at the end of its step carries out what lies in `peers.mail`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._roster = Roster(config)
        self.peers = self._side()
        self._planner = Planner(self._roster, self.peers.lay, self._is_held_outside)
        self._requests: dict[str, Request] = {}
        self._outbox: dict[str, Outbox] = {}
        self._gate = GrammarGate()
        self._totals = self._roster.totals
        self._timed = 0  # live requests that have a deadline

    @property
    def tiers(self) -> Tiers | None:
        """What is below the device pool, if anything: the driver carries out its `ops`."""
        return self._roster.tiers

    @property
    def cache(self) -> RadixCache | NoCache:
        """What is known of prompts, for operators to look at."""
        return self._roster.memory.cache

    def _is_held_outside(self) -> bool:
        return self.peers.holds_memory or self._roster.is_moving

    @property
    def _receives(self) -> bool:
        """Pages come from a peer: the lower tiers are asked where they are computed, by the peer."""
        return self.config.pairing is not None and self.config.pairing.mode == "decode"

    def _side(self) -> PairSide:
        pairing = self.config.pairing
        if pairing is None:
            return NoPeers()
        if pairing.mode == "prefill":
            return PrefillSide(pairing, self._roster, self._end)
        return DecodeSide(pairing, self._roster, self._end, self._accept)

    @property
    def report(self) -> PlanReport:
        """What the newest plan holds."""
        return self._planner.report

    # ---- requests in

    def add(self, message: Generate, now_ns: int) -> list[TokenDelta]:
        """Take a request. What cannot be served comes back at once as a delta that ends it."""
        self._totals.requests += 1
        longest = min(self.config.context_length, self._roster.memory.capacity_tokens)
        mode = self.config.pairing.mode if self.config.pairing is not None else ""
        request = make_request(message, now_ns=now_ns, order=self._totals.requests, longest=longest, mode=mode)
        outbox = Outbox.of(message)
        refused = refusal(request, longest=longest, twin=request.rid in self._requests, full=self._is_full())
        if refused is not None:
            self._totals.aborted += 1
            if request.peer is not None:
                self.peers.leave(request, refused, None)
            delta = outbox.deliver(request, None, refused)
            return [delta] if delta else []
        self._requests[request.rid] = request
        self._outbox[request.rid] = outbox
        self._timed += request.deadline_ns is not None
        if request.sampling.grammar is None:
            return self._enqueue(request, now_ns)
        self._gate.hold(request, request.sampling.grammar)
        return []

    def _enqueue(self, request: Request, now_ns: int) -> list[TokenDelta]:
        """Nothing that this instance has to prepare stands in the way any more."""
        if request.peer is None or not self._receives:
            self._roster.prefetch(request, now_ns)
        if request.peer is not None:
            request.state = State.PAIRING
            return self.peers.enter(request, now_ns)
        request.state = State.WAITING
        self._roster.waiting.append(request)
        return []

    def _is_full(self) -> bool:
        """Whether as many requests wait, for whatever, as may."""
        if self.config.max_queued is None:
            return False
        waiting = len(self._roster.waiting) + len(self._gate) + self.peers.stats().num_pairing
        return waiting >= self.config.max_queued

    def grammars_wanted(self) -> list[GrammarSpec]:
        """Grammars to compile, each named once until it is ready."""
        return self._gate.wanted()

    def grammar_ready(self, spec: GrammarSpec, error: str, now_ns: int) -> list[TokenDelta]:
        """A grammar is compiled, or cannot be: then the requests that wait for it end with status 400."""
        deltas: list[TokenDelta] = []
        for request in self._gate.release(spec):
            if not error:
                deltas += self._enqueue(request, now_ns)
                continue
            request.state = State.WAITING
            self._roster.waiting.append(request)
            deltas.append(self._end(request, Finish("abort", message=error, status=400)))
        return deltas

    def abort(
        self, rid: str, *, exact: bool = False, every: bool = False, message: str = "Aborted."
    ) -> list[TokenDelta]:
        """End the request `rid`, or unless `exact` all whose id starts with it, or all; in whatever state they are."""
        if exact:
            doomed = [self._requests[rid]] if rid in self._requests else []
        else:
            doomed = [r for r in self._requests.values() if every or r.rid.startswith(rid)]
        return [self._end(request, Finish("abort", message=message, status=499)) for request in doomed]

    def stop(self, rid: str) -> None:
        """The detokenizer has answered this request (a stop string matched): end it without a word."""
        request = self._requests.get(rid)
        if request is not None:
            self._end(request, Finish("stop"))

    def expire(self, now_ns: int) -> list[TokenDelta]:
        """End the requests whose deadline has passed, and those whose peer lets them wait too long."""
        late: list[Request] = []
        if self._timed:
            late = [r for r in self._requests.values() if r.deadline_ns is not None and r.deadline_ns <= now_ns]
        finish = Finish("abort", message="The request did not finish within its time limit.", status=504)
        return [self._end(request, finish) for request in late] + self.peers.expire(now_ns)

    def flush_cache(self) -> bool:
        """Forget all cached prefixes of this process; refused (False) while requests run or wait or pages move."""
        if not self.idle or self._roster.is_moving:
            return False
        self._roster.memory.cache.evict(self.config.num_pages)
        if self.tiers is not None:
            self.tiers.forget()
        return True

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight."""
        return not (self._requests or self._roster.in_flight or self.peers.leases)

    def next_wake_ns(self) -> int | None:
        """When `expire` has something to do although nothing arrives: the nearest deadline. See `tiers` too."""
        times_ns = [r.deadline_ns for r in self._requests.values() if r.deadline_ns is not None] if self._timed else []
        if self.peers.wake_ns is not None:
            times_ns.append(self.peers.wake_ns)
        return min(times_ns, default=None)

    # ---- plans out and results in

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next step, or None when nothing can be computed now or `depth` plans are in flight."""
        self.peers.reserve(now_ns)
        if self.tiers is not None:
            self.tiers.tend(now_ns)
        return self._planner.plan(now_ns)

    def commit(self, result: StepResult, now_ns: int) -> list[TokenDelta]:
        """Take the result of the oldest plan in flight; returns the tokens it brought."""
        roster = self._roster
        plan = roster.in_flight.popleft()
        if plan.plan_id != result.plan_id:
            raise BugError(f"The result of plan {result.plan_id} came while that of plan {plan.plan_id} was due.")
        if result.lost:
            if plan.era == roster.era:  # the first that is heard of it
                roster.lose_memory()
            roster.memory.pool.complete(plan.plan_id)
            return []
        deltas: list[TokenDelta] = []
        for row, outcome in zip(plan.rows, result.rows, strict=True):
            request = roster.running.get(row.slot)
            if request is not None and request.epoch == row.epoch:
                delta = self._apply(request, row, outcome)
                if delta is not None:
                    deltas.append(delta)
        roster.memory.pool.complete(plan.plan_id)
        if self.tiers is not None and plan.num_tokens > len(plan.rows):
            self.tiers.computed(plan.num_tokens, result.forward_ns)
        deltas += self.peers.committed(plan.plan_id, now_ns)
        if not roster.running:
            roster.ratio.restart()
        return deltas

    def _apply(self, request: Request, row: Row, outcome: RowResult) -> TokenDelta | None:
        if outcome.error:
            return self._end(request, Finish("abort", message=outcome.error, status=500))
        request.computed = row.start + row.length
        request.pending -= row.sample
        if request.computed <= request.admitted:
            self._roster.share(request)
            if request.computed == request.admitted:
                self._roster.stop_prefilling(request)
        if request.logprob is not None and outcome.prompt:
            # What has been delivered is not wanted again when the request is retracted.
            start = request.logprob.start + len(outcome.prompt)
            request.logprob = msgspec.structs.replace(
                request.logprob, start=start if start < request.prompt_len else -1
            )
        return self._accept(request, outcome)

    def _accept(self, request: Request, outcome: RowResult) -> TokenDelta | None:
        """Take the tokens that were sampled for `request`, here or by its peer, and tell of them."""
        request.tokens += outcome.tokens
        self._totals.output_tokens += len(outcome.tokens)
        finish = self._finished(request, outcome)
        if finish is None:
            return self._outbox[request.rid].deliver(request, outcome, None)
        if request.bound:
            self.peers.computed(request, outcome)
            return None
        return self._end(request, finish, outcome)

    def _finished(self, request: Request, outcome: RowResult) -> Finish | None:
        """Whether the sequence ends here; a stop token counts before the length. Stop strings are the detokenizer's."""
        if outcome.tokens:
            token, sampling = outcome.tokens[-1], request.sampling
            eos = token in self.config.eos_token_ids
            stop = token in sampling.stop_token_ids
            if outcome.ended:  # the token that completes a grammar is part of the text, unless it is a stop token
                return Finish("stop", matched=token if eos or stop else None)
            if request.output_len > sampling.min_new_tokens and (stop or (eos and not sampling.ignore_eos)):
                return Finish("stop", matched=token)
        if len(request.tokens) >= request.max_total and request.computed >= request.admitted:
            return Finish("length", length=request.output_len)
        return None

    def _end(self, request: Request, finish: Finish, outcome: RowResult | None = None) -> TokenDelta:
        """The one way a request ends."""
        roster, lease = self._roster, None
        match request.state:
            case State.RUNNING if request.bound:
                lease = roster.vacate(request, keep=finish.status != 500)
            case State.RUNNING:
                roster.leave(request, keep=finish.status != 500)
            case State.WAITING:
                roster.waiting.remove(request)
            case State.LANDED:
                roster.unlease(request)
            case State.GRAMMAR:
                self._gate.drop(request)
            case _:  # a matter of the peers alone
                pass
        if self.tiers is not None and request.fetch is not None:
            self.tiers.leave(request.fetch)
        if request.peer is not None:
            self.peers.leave(request, finish, lease)
        request.state, request.finish = State.FINISHED, finish
        del self._requests[request.rid]
        self._timed -= request.deadline_ns is not None
        self._totals.finished += finish.kind != "abort"
        self._totals.aborted += finish.kind == "abort"
        delta = self._outbox.pop(request.rid).deliver(request, outcome, finish)
        assert delta is not None, "an end is always told"
        return delta

    # ---- for operators and tests

    def stats(self) -> SchedulerStats:
        """A snapshot; cheap enough for every scrape."""
        size, totals, memory, roster = self.config.page_size, self._totals, self._roster.memory, self._roster
        return SchedulerStats(
            num_running=len(roster.running),
            num_waiting=len(roster.waiting),
            num_grammar=len(self._gate),
            num_pages=memory.pool.capacity,
            page_size=size,
            used_tokens=(memory.pool.capacity - memory.available_pages) * size,
            cached_tokens=memory.cache.evictable_pages * size,
            free_tokens=memory.pool.free * size,
            max_total_tokens=memory.capacity_tokens,
            waiting_tokens=sum(len(request.tokens) for request in roster.waiting),
            new_token_ratio=roster.ratio.value,
            total_requests=totals.requests,
            total_finished=totals.finished,
            total_aborted=totals.aborted,
            total_prompt_tokens=totals.prompt_tokens,
            total_cached_tokens=totals.cached_tokens,
            total_output_tokens=totals.output_tokens,
            total_retractions=totals.retractions,
            total_plans=totals.plans,
            pairs=self.peers.stats(),
            tiers=TierStats() if self.tiers is None else self.tiers.stats(),
        )

    def check(self) -> None:
        """BugError unless requests, slots, leases, tree and pool agree: O(everything), for tests and an idle server."""
        self._roster.check(self.peers.leases, idle=self.idle)
