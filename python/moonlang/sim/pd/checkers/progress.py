"""A server gets its work done: deadlines end requests in every state, nobody idles while requests could run."""

from __future__ import annotations

from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch
from moonlang.sim.stage import Stage
from moonlang.sim.violation import Violation

_NAME = "progress"


class Progress(Watch[Stage]):
    """Looks at all requests of one server after each of its steps."""

    def after_step(self, stage: Stage) -> None:
        scheduler, now_ns = stage.scheduler, stage.now_ns
        for request in inside.requests(scheduler):
            if request.deadline_ns is not None and request.deadline_ns <= now_ns:
                raise Violation(_NAME, f"{request.rid} is {request.state.value} past its deadline")
        stats = scheduler.stats()
        elsewhere = stats.pairs.num_moving or stats.pairs.quarantined_pages
        if not len(stage.pipeline) and stats.num_running + stats.num_waiting and not elsewhere:
            raise Violation(
                _NAME, f"nothing is in flight while {stats.num_running} run and {stats.num_waiting} requests wait"
            )

    def at_end(self, stage: Stage) -> None:
        stats = stage.scheduler.stats()
        if stats.pairs.num_pairing or stats.pairs.num_moving or stats.pairs.quarantined_pages:
            raise Violation(_NAME, f"rooms are left at the end: {stats.pairs}")
