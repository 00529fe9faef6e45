"""What the next plan holds. There is no prefill phase and no decode phase.

A running request has `scheduled` positions whose KV some plan computes and len(tokens) + pending positions it wants; a
plan brings it closer. One missing position is a decode row, many are a prefill row, cut to the budget. A plan is built
in a fixed order - reclaim, decode rows and arrivals, prefill rows of running requests, admissions - so that nothing
laid into a plan can be retracted by the same plan.

With depth 2 a plan is made before the tokens of the one in flight are known: `pending` counts those samples, and a
request that turns out to have ended leaves a void row behind, recognised by its epoch; pages such a row may write to
are retired to that plan (see `mem_cache.pool`).

With lanes, one for each stage of a pipeline, the plans in flight are of different requests, apart from the chunks of a
prompt: every stage has one to work at.
"""

from __future__ import annotations

from collections.abc import Callable

from moonlang.base.errors import BugError
from moonlang.core.lease import Lease
from moonlang.core.plan import Row, SlotStart, StepPlan
from moonlang.core.request import Request, State
from moonlang.scheduler import policy
from moonlang.scheduler.roster import Roster, lease_of
from moonlang.scheduler.settings import PlanReport


class Planner:
    """Builds plans from a roster.

    lay: is told the rows of each plan, and says after every how many layers it wants to hear of progress. held_outside:
    whether memory is held that comes back without a plan.
    """

    def __init__(self, roster: Roster, lay: Callable[[int, list[Row]], int], held_outside: Callable[[], bool]) -> None:
        self.report = PlanReport()
        self._config = roster.config
        self._roster = roster
        self._memory = roster.memory
        self._lay = lay
        self._held_outside = held_outside
        self._next_plan = 0

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next step, or None when nothing can be computed now or `depth` plans are in flight."""
        roster = self._roster
        if len(roster.in_flight) >= self._config.depth or not (roster.running or roster.waiting or roster.arriving):
            return None
        self._reclaim()
        rows = self._decode_rows()
        starts = self._arrivals(rows, now_ns)
        decode_rows, arrived, budget = len(rows), len(starts), self._budget(len(rows))
        budget -= self._continue_prefills(rows, budget)
        cached = self._admissions(starts, rows, budget, now_ns)
        if not rows:
            return self._unblock(now_ns)
        report_layers = self._lay(self._next_plan, rows)
        plan = StepPlan(self._next_plan, now_ns, tuple(starts), tuple(rows), report_layers, roster.era)
        self._next_plan += 1
        roster.totals.plans += 1
        roster.in_flight.append(plan)
        roster.ratio.relax()
        self.report = PlanReport(
            new_seqs=len(starts) - arrived,
            new_tokens=sum(row.length for row in rows[decode_rows:]),
            cached_tokens=cached,
            decode_rows=decode_rows,
        )
        return plan

    def _reclaim(self) -> None:
        """Retract until every decode row can get the page it needs, now or when the plans in flight are done."""
        if self._config.may_preempt and self._roster.waiting:
            self._preempt()
        size = self._config.page_size
        while len(self._roster.running) > 1:
            need = 0
            for request in self._roster.running.values():
                if _wants_decode(request) and request.scheduled >= len(lease_of(request).pages) * size:
                    need += 1
            if need > self._memory.coming_pages:
                self._memory.call_in()
            victim = self._victim() if need > self._memory.coming_pages else None
            if victim is None:
                return
            self._roster.retract(victim)

    def _decode_rows(self) -> list[Row]:
        """A row for each request that lacks exactly the position of the token its slot has sampled last."""
        if self._config.lanes > 1:
            return self._lane_rows()
        grow = self._memory.grow
        return [
            self._row(request, request.scheduled + 1, ())
            for request in self._roster.running.values()
            if _wants_decode(request) and grow(lease_of(request), request.scheduled + 1)
        ]

    def _lane_rows(self) -> list[Row]:
        """An even share of the decode rows, of requests that no plan in flight samples a token of: the first stage of a
        pipeline would have to wait for it. Who has waited longest comes first; the rows bring their tokens."""
        wanting = [request for request in self._roster.running.values() if _wants_decode(request)]
        ready = sorted((request for request in wanting if not request.pending), key=lambda request: request.last_plan)
        most = -(-len(wanting) // self._config.lanes)
        if self._config.lane_rows is not None:
            most = min(most, self._config.lane_rows)
        return [
            self._row(request, request.scheduled + 1, (request.tokens[-1],))
            for request in ready[:most]
            if self._memory.grow(lease_of(request), request.scheduled + 1)
        ]

    def _budget(self, decode_rows: int) -> int:
        """Prompt tokens this plan may compute."""
        chunk = self._config.chunk_tokens
        return self._config.max_prefill_tokens if chunk is None else max(chunk - decode_rows, self._config.page_size)

    def _continue_prefills(self, rows: list[Row], budget: int) -> int:
        """Rows for running requests whose prompt is not computed yet; returns the tokens they take."""
        spent = 0
        for request in self._roster.running.values():
            if spent >= budget:
                break
            start, total = request.scheduled, request.admitted
            if start < total:
                end = self._chunk_end(start, total, budget - spent)
                if self._memory.grow(lease_of(request), end):
                    rows.append(self._row(request, end, tuple(request.tokens[start:end])))
                    spent += end - start
        return spent

    def _arrivals(self, rows: list[Row], now_ns: int) -> list[SlotStart]:
        """Give slots to requests whose prompt was computed elsewhere: what they lack is the row of a decode."""
        roster = self._roster
        starts: list[SlotStart] = []
        for request in _landed(roster):
            if not roster.slots or not self._memory.grow(lease_of(request), len(request.tokens)):
                break
            del roster.arriving[request.rid]
            at = request.prompt_len
            starts.append(roster.start(request, lease_of(request), at, now_ns))
            rows.append(self._row(request, len(request.tokens), tuple(request.tokens[at:])))
        return starts

    def _admissions(self, starts: list[SlotStart], rows: list[Row], budget: int, now_ns: int) -> int:
        """Admit waiting requests and lay their first rows; returns the cached tokens they found."""
        roster, cached, most = self._roster, 0, self._most_admissions(len(rows))
        if not roster.waiting or budget <= 0 or not roster.slots:
            return cached
        admitted = 0
        for request in policy.order(roster.waiting, self._memory.cache, self._config):
            if budget <= 0 or admitted == most:
                break
            if self._config.chunk_tokens is None and rows and len(request.tokens) > budget:
                break  # a prompt that is never cut goes in whole, or alone
            if roster.is_fetching(request, now_ns):
                continue
            prefix = self._memory.cache.match(request.tokens, request.extra_key, policy.reusable(request))
            key = roster.prefix_key(request, prefix)
            if key is not None and key in roster.prefilling:
                continue  # another request computes these very tokens: take them from the cache a little later
            lease = self._memory.open(prefix)
            end = self._chunk_end(prefix.tokens, len(request.tokens), budget)
            if not self._may_start(request, lease, end, alone=not (rows or roster.running)):
                self._memory.close(lease, None)
                break
            if key is not None:
                roster.prefilling[key] = request.rid
            if not request.retractions:
                roster.found(request, prefix.tokens)
            starts.append(roster.start(request, lease, prefix.tokens, now_ns))
            rows.append(self._row(request, end, tuple(request.tokens[prefix.tokens : end])))
            admitted += 1
            cached += prefix.tokens
            budget -= end - prefix.tokens
        if admitted:
            roster.waiting[:] = [request for request in roster.waiting if request.state is State.WAITING]
        return cached

    def _most_admissions(self, rows: int) -> int | None:
        """Requests that may join a plan of `rows` rows; None: any number."""
        bounds = [self._config.prefill_max_requests]
        if self._config.lane_rows is not None:
            bounds.append(max(0, self._config.lane_rows - rows))
        return min((bound for bound in bounds if bound is not None), default=None)

    def _may_start(self, request: Request, lease: Lease, end: int, *, alone: bool) -> bool:
        """Whether there is room for `request`; if so its lease covers positions up to `end` afterwards.

        Alone it may use everything: `add` has checked that it fits, once no plan in flight holds pages any more.
        """
        if not (alone or self._has_room(request, lease)):
            return False
        return self._memory.grow(lease, end)

    def _has_room(self, request: Request, lease: Lease) -> bool:
        """Whether there is room next to others, also at the cost of what lower tiers hold for convenience."""
        roster, memory = self._roster, self._memory
        if not roster.slots:
            return False
        if not roster.has_room(request, lease, memory.available_pages):
            memory.call_in()
        return roster.has_room(request, lease, memory.available_pages)

    def _chunk_end(self, start: int, total: int, budget: int) -> int:
        """Where a row of prompt positions from `start` ends: between pages, so that a chunk enters the tree whole."""
        if self._config.chunk_tokens is None or start + budget >= total:
            return total
        end, size = start + budget, self._config.page_size
        return end // size * size if end // size * size > start else end

    def _row(self, request: Request, end: int, tokens: tuple[int, ...]) -> Row:
        """Schedule positions up to `end`; the row carries what the executor does not know of the page table."""
        start, at, pages = request.scheduled, request.sent_pages, lease_of(request).pages
        sample = end == len(request.tokens) + request.pending and request.remaining > 0
        request.scheduled = end
        request.pending += sample
        request.last_plan = self._next_plan
        if at == len(pages):
            return Row(request.slot, request.epoch, start, end - start, tokens, sample)
        request.sent_pages = len(pages)
        return Row(request.slot, request.epoch, start, end - start, tokens, sample, at, tuple(pages[at:]))

    # ---- when memory is short

    def _unblock(self, now_ns: int) -> StepPlan | None:
        """No row could be laid. If nothing on its way will change that, requests hold each other's memory."""
        roster = self._roster
        if roster.in_flight:
            return None
        holders = [*roster.running.values(), *_landed(roster)]
        victim = self._victim()
        if victim is None and not self._held_outside():
            victim = min(holders, key=self._rank, default=None)
        if victim is not None and len(holders) > 1:
            roster.retract(victim)
            return self.plan(now_ns)
        if self._held_outside():
            return None
        raise BugError(f"{len(roster.running)} running and {len(roster.waiting)} waiting requests cannot go on.")

    def _victim(self) -> Request | None:
        """Whom to retract, None when all who hold memory are bound to a peer: those are waited for."""
        roster = self._roster
        free = [request for request in [*roster.running.values(), *_landed(roster)] if not request.bound]
        return min(free, key=self._rank, default=None)

    def _rank(self, request: Request) -> tuple[int, ...]:
        """Lowest priority, then fewest output tokens, then longest prompt, then youngest."""
        sign = 0 if not self._config.priority else -1 if self._config.priority_low_first else 1
        return sign * request.priority, request.output_len, -request.prompt_len, -request.order

    def _preempt(self) -> None:
        """Make room for the most urgent waiting request at the cost of running ones that it outranks by the gap."""
        roster, config = self._roster, self._config
        request = policy.order(roster.waiting, self._memory.cache, config)[0]
        prefix = self._memory.cache.match(request.tokens, request.extra_key, policy.reusable(request))
        lease = self._memory.open(prefix)
        sign = -1 if config.priority_low_first else 1
        while roster.running and not (roster.slots and roster.has_room(request, lease, self._memory.coming_pages)):
            victim = self._victim()
            if victim is None or sign * (request.priority - victim.priority) < max(1, config.preempt_gap):
                break  # equals never preempt each other
            roster.retract(victim)
        self._memory.close(lease, None)


def _landed(roster: Roster) -> list[Request]:
    """Requests whose whole prompt has arrived and that only lack a slot."""
    return [request for request in roster.arriving.values() if request.state is State.LANDED]


def _wants_decode(request: Request) -> bool:
    """True when exactly one position is missing, and its token was sampled in this slot: the executor knows it."""
    at = request.scheduled
    return at >= request.admitted and at == len(request.tokens) + request.pending - 1 and request.remaining > 0
