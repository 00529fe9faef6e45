"""Every queue and every plan stays within its named bound, and plans have the shape that `core.plan` promises."""

from __future__ import annotations

from moonlang.core.plan import Row, StepPlan
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch, comes_complete
from moonlang.sim.stage import Stage
from moonlang.sim.violation import Violation

_NAME = "bounds"


def _is_prompt(config: SchedulerConfig, row: Row) -> bool:
    """With lanes decode rows bring their token: then a prompt's last row of one token is taken for one, too."""
    return bool(row.tokens) and not (config.lanes > 1 and row.sample and row.length == 1)


class Bounds(Watch[Stage]):
    """Slots, plans in flight, rows and tokens of a plan, length of the queue."""

    def on_plan(self, stage: Stage, plan: StepPlan) -> None:
        config = stage.config
        slots = [row.slot for row in plan.rows]
        if not slots or len(dict.fromkeys(slots)) != len(slots):
            raise Violation(_NAME, f"plan {plan.plan_id} has no row, or two rows for a slot: {slots}")
        complete = dict.fromkeys(start.slot for start in plan.starts if comes_complete(start, plan))
        own = [row for row in plan.rows if row.slot not in complete]
        decode = [not _is_prompt(config, row) for row in own]
        if config.lanes > 1:
            self._check_lanes(stage, plan)
        elif decode != sorted(decode, reverse=True):
            raise Violation(_NAME, f"plan {plan.plan_id} has a decode row behind a prefill row")
        tenants = dict.fromkeys((row.slot, row.epoch) for row in plan.rows)
        if any((start.slot, start.epoch) not in tenants for start in plan.starts):
            raise Violation(_NAME, f"plan {plan.plan_id} starts a request without a row for it")
        if len(stage.pipeline) > config.depth:
            raise Violation(_NAME, f"{len(stage.pipeline)} plans are in flight")
        self._check_budget(stage, plan, [row.length for row in own if _is_prompt(config, row)])
        admitted = len(plan.starts) - len(complete)
        if config.prefill_max_requests is not None and admitted > config.prefill_max_requests:
            raise Violation(_NAME, f"plan {plan.plan_id} admits {len(plan.starts)} requests")

    def _check_lanes(self, stage: Stage, plan: StepPlan) -> None:
        """No row needs a token that another plan in flight is to sample."""
        others = [other for other in stage.pipeline.plans if other.plan_id != plan.plan_id]
        awaited = dict.fromkeys((row.slot, row.epoch) for other in others for row in other.rows if row.sample)
        if any(not row.tokens or (row.slot, row.epoch) in awaited for row in plan.rows):
            raise Violation(_NAME, f"plan {plan.plan_id} waits for a token of a plan in flight")

    def _check_budget(self, stage: Stage, plan: StepPlan, lengths: list[int]) -> None:
        """Prompt tokens: the chunk left by decode rows, at least a page; or, uncut, the prefill bound or one prompt."""
        config = stage.config
        if config.chunk_tokens is not None:
            decode_rows = sum(not _is_prompt(config, row) for row in plan.rows)
            most = max(config.chunk_tokens - decode_rows, config.page_size)
        else:
            most = max(config.max_prefill_tokens, lengths[0] if len(plan.rows) == 1 and lengths else 0)
        if sum(lengths) > most:
            raise Violation(_NAME, f"plan {plan.plan_id} computes {lengths} prompt tokens, at most {most} are allowed")

    def after_step(self, stage: Stage) -> None:
        config, scheduler = stage.config, stage.scheduler
        running = inside.running(scheduler)
        slots = [request.slot for request in running]
        if len(dict.fromkeys(slots)) != len(slots) or not all(0 <= slot < config.max_running for slot in slots):
            raise Violation(_NAME, f"slots {slots} are taken, {config.max_running} exist")
        fresh = sum(r.retractions == 0 for r in inside.waiting(scheduler)) + inside.num_grammar(scheduler)
        # On a decode instance requests whose other half has failed are queued too, long after they were accepted.
        falls_back = config.pairing is not None and config.pairing.fallback
        if config.max_queued is not None and fresh > config.max_queued and not falls_back:
            raise Violation(_NAME, f"{fresh} requests wait, {config.max_queued} may")
