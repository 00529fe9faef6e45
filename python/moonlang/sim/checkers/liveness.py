"""Work gets done: nobody idles while requests wait, deadlines end requests, hang-ups end them at once, the run ends."""

from __future__ import annotations

from moonlang.base.clock import NS_PER_MS
from moonlang.sim import inside
from moonlang.sim.checkers.watch import Watch
from moonlang.sim.violation import Violation
from moonlang.sim.world import World

_NAME = "liveness"
_PLANS_PER_TOKEN = 3  # retraction and preemption compute tokens again, but not for ever
_PLANS_MORE = 200


class Liveness(Watch[World]):
    """Bounds on waiting, in steps and in virtual time."""

    def __init__(self) -> None:
        self._plans = 0

    def on_plan(self, world: World, plan: object) -> None:
        self._plans += 1
        config = world.config
        longest = config.context_length
        most = _PLANS_MORE + _PLANS_PER_TOKEN * longest * len(world.case.scripts)
        if self._plans > most:
            raise Violation(_NAME, f"{most} plans have not been enough for {len(world.case.scripts)} requests")

    def after_step(self, world: World) -> None:
        stats = world.scheduler.stats()
        blocked = stats.num_running + stats.num_waiting and not inside.is_moving(world.scheduler)
        if not len(world.pipeline) and blocked:
            raise Violation(
                _NAME, f"nothing is in flight while {stats.num_running} run and {stats.num_waiting} requests wait"
            )
        for client in world.unfinished:
            if client.hung_up_ns is not None:
                raise Violation(_NAME, f"{client.script.rid} has hung up and is not ended")
            timeout_ns = client.script.timeout_ms * NS_PER_MS
            if timeout_ns and world.now_ns >= client.sent_ns + timeout_ns:
                raise Violation(_NAME, f"{client.script.rid} is past its deadline and not ended")
