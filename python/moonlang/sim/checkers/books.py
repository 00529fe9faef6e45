"""The scheduler's totals agree with what was asked of it."""

from __future__ import annotations

from moonlang.sim.checkers.watch import Watch
from moonlang.sim.violation import Violation
from moonlang.sim.world import World


class Books(Watch[World]):
    """Every request has been counted, and either finished or aborted."""

    def at_end(self, world: World) -> None:
        stats = world.scheduler.stats()
        if not stats.total_requests == stats.total_finished + stats.total_aborted == len(world.clients):
            raise Violation("books", f"{len(world.clients)} requests were sent, but {stats}")
