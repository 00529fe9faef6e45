"""Nobody is admitted while somebody waits who comes first: by priority, under fcfs and lof by the policy's key too."""

from __future__ import annotations

from moonlang.core.plan import StepPlan
from moonlang.core.request import Request
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch, comes_complete
from moonlang.sim.stage import Stage
from moonlang.sim.violation import Violation

_NAME = "order"


class Order(Watch[Stage]):
    """Looks at the queue that a plan with admissions leaves behind."""

    def on_plan(self, stage: Stage, plan: StepPlan) -> None:
        if not plan.starts:
            return
        config = stage.config
        running = inside.running(stage.scheduler)
        by_epoch = {request.epoch: request for request in running}
        admitted = [by_epoch[start.epoch] for start in plan.starts if not comes_complete(start, plan)]
        for waiting in inside.waiting(stage.scheduler):
            if inside.is_fetching(stage.scheduler, waiting, stage.now_ns):
                continue
            if waiting.fetch is not None and waiting.fetch.reason == "memory":
                continue  # it may have waited for room, and given way to one of these within this plan
            passed = [r for r in admitted if _rank(waiting, config) < _rank(r, config)]
            if passed and not any(_shares(waiting, r, config) for r in running):
                raise Violation(_NAME, f"{passed[0].rid} is admitted while {waiting.rid} waits, which comes first")


def _rank(request: Request, config: SchedulerConfig) -> tuple[int, ...]:
    """Lower comes first. Orders that depend on the tree are not looked into: equal ranks."""
    sign = 0 if not config.priority else 1 if config.priority_low_first else -1
    if config.policy in ("fcfs", "priority"):
        return (sign * request.priority, request.order)
    if config.policy == "lof":
        return (sign * request.priority, -(request.max_total - len(request.tokens)))
    return (sign * request.priority,)


def _shares(waiting: Request, running: Request, config: SchedulerConfig) -> bool:
    """Whether `waiting` may be waiting for `running` to compute a prefix for both."""
    run = config.prefix_wait_tokens
    return waiting.extra_key == running.extra_key and waiting.tokens[:run] == running.tokens[:run]
