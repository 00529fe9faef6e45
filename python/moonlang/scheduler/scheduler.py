"""The scheduler: requests in, plans out, results in, tokens out. Pure; one object owns every request and every page.

There is no prefill phase and no decode phase. A running request has `scheduled` positions whose KV some plan computes
and len(tokens) + pending positions it wants; a plan brings it closer. One missing position is a decode row, many are
a prefill row, cut to the budget. A plan is built in a fixed order - reclaim, decode rows, prefill rows of running
requests, admissions - so that nothing laid into a plan can be retracted by the same plan.

With depth 2 a plan is made before the tokens of the one in flight are known: `pending` counts those samples, and a
request that turns out to have ended leaves a void row behind, recognised by its epoch; pages such a row may write to
are retired to that plan (see `mem_cache.pool`).
"""

from __future__ import annotations

from collections import deque

import msgspec

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease, PrefixRef
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.plan import Row, RowResult, SlotStart, StepPlan, StepResult
from moonlang.core.request import Finish, Request, State
from moonlang.core.sampling import GrammarSpec
from moonlang.mem_cache.leases import Leases
from moonlang.scheduler import policy
from moonlang.scheduler.estimate import NewTokenRatio
from moonlang.scheduler.grammar_gate import GrammarGate
from moonlang.scheduler.intake import make_request, refusal
from moonlang.scheduler.outbox import Outbox
from moonlang.scheduler.settings import PlanReport, SchedulerConfig, SchedulerStats, Totals


class Scheduler:
    """The driver calls `expire` and then `plan` until it returns None, and `commit` for every result, in order."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.report = PlanReport()
        self._memory = Leases(config.num_pages, config.page_size, radix=config.radix, eviction=config.eviction)
        self._requests: dict[str, Request] = {}
        self._outbox: dict[str, Outbox] = {}
        self._waiting: list[Request] = []
        self._gate = GrammarGate()
        self._running: dict[int, Request] = {}  # by slot, in order of admission
        self._slots = list(range(config.max_running - 1, -1, -1))
        self._in_flight: deque[StepPlan] = deque()
        self._prefilling: dict[tuple[int, tuple[int, ...]], str] = {}  # a run of tokens being computed -> rid
        self._ratio = NewTokenRatio(config.conservativeness)
        self._totals = Totals()
        self._next_plan = 0
        self._next_epoch = 0
        self._timed = 0  # live requests that have a deadline

    # ---- requests in

    def add(self, message: Generate, now_ns: int) -> list[TokenDelta]:
        """Take a request. What cannot be served comes back at once as a delta that ends it."""
        self._totals.requests += 1
        longest = min(self.config.context_length, self._memory.capacity_tokens)
        request = make_request(message, now_ns=now_ns, order=self._totals.requests, longest=longest)
        outbox = Outbox.of(message)
        full = self.config.max_queued is not None and len(self._waiting) + len(self._gate) >= self.config.max_queued
        refused = refusal(request, longest=longest, twin=request.rid in self._requests, full=full)
        if refused is not None:
            self._totals.aborted += 1
            delta = outbox.deliver(request, None, refused)
            return [delta] if delta else []
        self._requests[request.rid] = request
        self._outbox[request.rid] = outbox
        self._timed += request.deadline_ns is not None
        if request.sampling.grammar is None:
            self._waiting.append(request)
        else:
            self._gate.hold(request, request.sampling.grammar)
        return []

    def grammars_wanted(self) -> list[GrammarSpec]:
        """Grammars to compile, each named once until it is ready."""
        return self._gate.wanted()

    def grammar_ready(self, spec: GrammarSpec, error: str) -> list[TokenDelta]:
        """A grammar is compiled, or cannot be: then the requests that wait for it end with status 400."""
        deltas: list[TokenDelta] = []
        for request in self._gate.release(spec):
            request.state = State.WAITING
            self._waiting.append(request)
            if error:
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
        """End the requests whose deadline has passed."""
        if not self._timed:
            return []
        late = [r for r in self._requests.values() if r.deadline_ns is not None and r.deadline_ns <= now_ns]
        finish = Finish("abort", message="The request did not finish within its time limit.", status=504)
        return [self._end(request, finish) for request in late]

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; refused (False) while requests run or wait."""
        if not self.idle:
            return False
        self._memory.cache.evict(self.config.num_pages)
        return True

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight."""
        return not self._requests and not self._in_flight

    def next_wake_ns(self) -> int | None:
        """When `expire` has something to do although nothing arrives: the nearest deadline."""
        if not self._timed:
            return None
        return min(r.deadline_ns for r in self._requests.values() if r.deadline_ns is not None)

    # ---- plans out

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next step, or None when nothing can be computed now or `depth` plans are in flight."""
        if len(self._in_flight) >= self.config.depth or not (self._running or self._waiting):
            return None
        self._reclaim()
        rows = self._decode_rows()
        decode_rows, budget = len(rows), self._budget(len(rows))
        budget -= self._continue_prefills(rows, budget)
        starts, cached = self._admissions(rows, budget, now_ns)
        if not rows:
            return self._unblock(now_ns)
        plan = StepPlan(self._next_plan, now_ns, tuple(starts), tuple(rows))
        self._next_plan += 1
        self._totals.plans += 1
        self._in_flight.append(plan)
        self._ratio.relax()
        self.report = PlanReport(
            new_seqs=len(starts),
            new_tokens=sum(row.length for row in rows[decode_rows:]),
            cached_tokens=cached,
            decode_rows=decode_rows,
        )
        return plan

    def _reclaim(self) -> None:
        """Retract until every decode row can get the page it needs, now or when the plans in flight are done."""
        if self.config.may_preempt and self._waiting:
            self._preempt()
        size = self.config.page_size
        while len(self._running) > 1:
            need = 0
            for request in self._running.values():
                if _wants_decode(request) and request.scheduled >= len(_lease(request).pages) * size:
                    need += 1
            if need <= self._memory.coming_pages:
                return
            self._retract(self._victim())

    def _decode_rows(self) -> list[Row]:
        """A row for each request that lacks exactly the position of the token its slot has sampled last."""
        grow = self._memory.grow
        return [
            self._row(request, request.scheduled + 1, ())
            for request in self._running.values()
            if _wants_decode(request) and grow(_lease(request), request.scheduled + 1)
        ]

    def _budget(self, decode_rows: int) -> int:
        """Prompt tokens this plan may compute."""
        chunk = self.config.chunk_tokens
        return self.config.max_prefill_tokens if chunk is None else max(chunk - decode_rows, self.config.page_size)

    def _continue_prefills(self, rows: list[Row], budget: int) -> int:
        """Rows for running requests whose prompt is not computed yet; returns the tokens they take."""
        spent = 0
        for request in self._running.values():
            if spent >= budget:
                break
            start, total = request.scheduled, request.admitted
            if start < total:
                end = self._chunk_end(start, total, budget - spent)
                if self._memory.grow(_lease(request), end):
                    rows.append(self._row(request, end, tuple(request.tokens[start:end])))
                    spent += end - start
        return spent

    def _admissions(self, rows: list[Row], budget: int, now_ns: int) -> tuple[list[SlotStart], int]:
        """Admit waiting requests and lay their first rows; returns their starts and the cached tokens they found."""
        starts: list[SlotStart] = []
        cached = 0
        if not self._waiting or budget <= 0 or not self._slots:
            return starts, cached
        for request in policy.order(self._waiting, self._memory.cache, self.config):
            if budget <= 0 or len(starts) == self.config.prefill_max_requests:
                break
            if self.config.chunk_tokens is None and rows and len(request.tokens) > budget:
                break  # a prompt that is never cut goes in whole, or alone
            prefix = self._memory.cache.match(request.tokens, request.extra_key, policy.reusable(request))
            key = self._prefix_key(request, prefix)
            if key is not None and key in self._prefilling:
                continue  # another request computes these very tokens: take them from the cache a little later
            lease = self._memory.open(prefix)
            end = self._chunk_end(prefix.tokens, len(request.tokens), budget)
            if not self._may_start(request, lease, end, alone=not (rows or self._running)):
                self._memory.close(lease, None)
                break
            if key is not None:
                self._prefilling[key] = request.rid
            starts.append(self._start(request, lease, now_ns))
            rows.append(self._row(request, end, tuple(request.tokens[prefix.tokens : end])))
            cached += prefix.tokens
            budget -= end - prefix.tokens
        if starts:
            self._waiting = [request for request in self._waiting if request.state is State.WAITING]
        return starts, cached

    def _chunk_end(self, start: int, total: int, budget: int) -> int:
        """Where a row of prompt positions from `start` ends: between pages, so that a chunk enters the tree whole."""
        if self.config.chunk_tokens is None or start + budget >= total:
            return total
        end, size = start + budget, self.config.page_size
        return end // size * size if end // size * size > start else end

    def _row(self, request: Request, end: int, tokens: tuple[int, ...]) -> Row:
        """Schedule positions up to `end`; the row carries what the executor does not know of the page table."""
        start, at, pages = request.scheduled, request.sent_pages, _lease(request).pages
        sample = end == len(request.tokens) + request.pending and request.remaining > 0
        request.scheduled = end
        request.pending += sample
        request.last_plan = self._next_plan
        if at == len(pages):
            return Row(request.slot, request.epoch, start, end - start, tokens, sample)
        request.sent_pages = len(pages)
        return Row(request.slot, request.epoch, start, end - start, tokens, sample, at, tuple(pages[at:]))

    def _unblock(self, now_ns: int) -> StepPlan | None:
        """No row could be laid. If nothing in flight will change that, running requests hold each other's memory."""
        if self._in_flight:
            return None
        if len(self._running) > 1:
            self._retract(self._victim())
            return self.plan(now_ns)
        raise BugError(f"{len(self._running)} running and {len(self._waiting)} waiting requests cannot go on.")

    # ---- admission

    def _has_room(self, request: Request, lease: Lease, pages: int) -> bool:
        """Whether there is a slot for `request`, and `pages` suffice for it and for what the running will ask for."""
        if not self._slots:
            return False
        reserved = sum(self._expected_pages(other, _lease(other)) for other in self._running.values())
        return self._expected_pages(request, lease) + reserved <= pages

    def _expected_pages(self, request: Request, lease: Lease) -> int:
        """Pages that `request` is expected to ask for beyond its lease."""
        wanted = len(request.tokens) + request.pending + self._ratio.reserve(request)
        return max(0, self._memory.pages_for(wanted) - len(lease.pages))

    def _may_start(self, request: Request, lease: Lease, end: int, *, alone: bool) -> bool:
        """Whether there is room for `request`; if so its lease covers positions up to `end` afterwards.

        Alone it may use everything: `add` has checked that it fits, once no plan in flight holds pages any more.
        """
        if not (alone or self._has_room(request, lease, self._memory.available_pages)):
            return False
        return self._memory.grow(lease, end)

    def _start(self, request: Request, lease: Lease, now_ns: int) -> SlotStart:
        request.slot = self._slots.pop()
        request.epoch = self._next_epoch
        self._next_epoch += 1
        request.state = State.RUNNING
        request.lease = lease
        request.scheduled = request.computed = lease.prefix.tokens
        request.admitted = len(request.tokens)
        request.pending = request.sent_pages = 0
        self._running[request.slot] = request
        if not request.retractions:
            request.admitted_ns = now_ns
            request.cached_tokens = lease.prefix.tokens
            self._totals.prompt_tokens += request.prompt_len
            self._totals.cached_tokens += lease.prefix.tokens
        tokens = tuple(request.tokens)
        return SlotStart(request.slot, request.epoch, request.prompt_len, tokens, request.sampling, request.logprob)

    def _prefix_key(self, request: Request, prefix: PrefixRef) -> tuple[int, tuple[int, ...]] | None:
        """Names the run of tokens behind the cached prefix, if it is long enough to be worth waiting for."""
        run = self.config.prefix_wait_tokens
        if not self.config.radix or policy.reusable(request) - prefix.tokens < run:
            return None
        return prefix.node.id, tuple(request.tokens[prefix.tokens : prefix.tokens + run])

    # ---- retraction and preemption

    def _victim(self) -> Request:
        """Whom to retract: lowest priority, then fewest output tokens, then longest prompt, then youngest."""
        sign = 0 if not self.config.priority else -1 if self.config.priority_low_first else 1
        return min(self._running.values(), key=lambda r: (sign * r.priority, r.output_len, -r.prompt_len, -r.order))

    def _retract(self, request: Request) -> None:
        """Take slot and pages away and queue the request again with its output; its rows in flight become void."""
        self._leave(request)
        request.state = State.WAITING
        request.retractions += 1
        self._totals.retractions += 1
        self._waiting.append(request)
        self._ratio.tighten(self._running.values())

    def _preempt(self) -> None:
        """Make room for the most urgent waiting request at the cost of running ones that it outranks by the gap."""
        request = policy.order(self._waiting, self._memory.cache, self.config)[0]
        prefix = self._memory.cache.match(request.tokens, request.extra_key, policy.reusable(request))
        lease = self._memory.open(prefix)
        sign = -1 if self.config.priority_low_first else 1
        while self._running and not self._has_room(request, lease, self._memory.coming_pages):
            victim = self._victim()
            if sign * (request.priority - victim.priority) < max(1, self.config.preempt_gap):
                break  # equals never preempt each other
            self._retract(victim)
        self._memory.close(lease, None)

    def _leave(self, request: Request, *, keep: bool = True) -> None:
        """Give back slot and lease. What is computed stays in the tree, unless it cannot be trusted (not `keep`)."""
        lease = _lease(request)
        if keep:
            self._share(request)
        self._memory.close(lease, self._touching(request))
        self._stop_prefilling(request)
        del self._running[request.slot]
        self._slots.append(request.slot)
        request.lease, request.slot, request.pending = None, -1, 0
        request.scheduled = request.computed = 0

    def _share(self, request: Request) -> None:
        """Let others use the computed pages of a running request."""
        changed = self._memory.share(
            _lease(request), request.tokens, request.computed, request.extra_key, self._touching(request)
        )
        request.sent_pages = min(request.sent_pages, changed)

    def _touching(self, request: Request) -> int | None:
        """The newest plan in flight with a row of this request."""
        in_flight = self._in_flight and request.last_plan >= self._in_flight[0].plan_id
        return request.last_plan if in_flight else None

    def _stop_prefilling(self, request: Request) -> None:
        if self._prefilling:
            self._prefilling = {key: rid for key, rid in self._prefilling.items() if rid != request.rid}

    # ---- results in

    def commit(self, result: StepResult, now_ns: int) -> list[TokenDelta]:
        """Take the result of the oldest plan in flight; returns the tokens it brought."""
        plan = self._in_flight.popleft()
        if plan.plan_id != result.plan_id:
            raise BugError(f"The result of plan {result.plan_id} came while that of plan {plan.plan_id} was due.")
        deltas: list[TokenDelta] = []
        for row, outcome in zip(plan.rows, result.rows, strict=True):
            request = self._running.get(row.slot)
            if request is not None and request.epoch == row.epoch:
                delta = self._apply(request, row, outcome)
                if delta is not None:
                    deltas.append(delta)
        self._memory.pool.complete(plan.plan_id)
        if not self._running:
            self._ratio.restart()
        return deltas

    def _apply(self, request: Request, row: Row, outcome: RowResult) -> TokenDelta | None:
        if outcome.error:
            return self._end(request, Finish("abort", message=outcome.error, status=500))
        request.computed = row.start + row.length
        request.pending -= row.sample
        if request.computed <= request.admitted:
            self._share(request)
            if request.computed == request.admitted:
                self._stop_prefilling(request)
        if request.logprob is not None and outcome.prompt:
            # What has been delivered is not wanted again when the request is retracted.
            start = request.logprob.start + len(outcome.prompt)
            request.logprob = msgspec.structs.replace(
                request.logprob, start=start if start < request.prompt_len else -1
            )
        request.tokens += outcome.tokens
        self._totals.output_tokens += len(outcome.tokens)
        finish = self._finished(request, outcome)
        if finish is not None:
            return self._end(request, finish, outcome)
        return self._outbox[request.rid].deliver(request, outcome, None)

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
        if request.state is State.RUNNING:
            self._leave(request, keep=finish.status != 500)
        elif request.state is State.WAITING:
            self._waiting.remove(request)
        else:
            self._gate.drop(request)
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
        size, totals, memory = self.config.page_size, self._totals, self._memory
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_grammar=len(self._gate),
            num_pages=memory.pool.capacity,
            page_size=size,
            used_tokens=(memory.pool.capacity - memory.available_pages) * size,
            cached_tokens=memory.cache.evictable_pages * size,
            free_tokens=memory.pool.free * size,
            max_total_tokens=memory.capacity_tokens,
            waiting_tokens=sum(len(request.tokens) for request in self._waiting),
            new_token_ratio=self._ratio.value,
            total_requests=totals.requests,
            total_finished=totals.finished,
            total_aborted=totals.aborted,
            total_prompt_tokens=totals.prompt_tokens,
            total_cached_tokens=totals.cached_tokens,
            total_output_tokens=totals.output_tokens,
            total_retractions=totals.retractions,
            total_plans=totals.plans,
        )

    def check(self) -> None:
        """BugError unless requests, slots, leases, tree and pool agree: O(everything), for tests and an idle server."""
        self._memory.check([_lease(request) for request in self._running.values()], idle=self.idle)
        for request in self._running.values():
            covered = len(_lease(request).pages) * self.config.page_size
            if not request.computed <= request.scheduled <= covered:
                raise BugError(
                    f"{request.rid}: {request.computed} computed, {request.scheduled} scheduled, {covered} held."
                )
        if len(self._slots) + len(self._running) != self.config.max_running:
            raise BugError(
                f"{len(self._slots)} slots are free and {len(self._running)} taken of {self.config.max_running}."
            )


def _wants_decode(request: Request) -> bool:
    """True when exactly one position is missing, and its token was sampled in this slot: the executor knows it."""
    at = request.scheduled
    return at >= request.admitted and at == len(request.tokens) + request.pending - 1 and request.remaining > 0


def _lease(request: Request) -> Lease:
    lease = request.lease
    if lease is None:
        raise BugError(f"Request {request.rid} has no lease.")
    return lease
