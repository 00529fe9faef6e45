"""Servers that share a store: each a World of its own, the one whose turn it is goes on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from moonlang.mem_cache.tiers import Tiers
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import inside
from moonlang.sim.checkers.isolation import Isolation
from moonlang.sim.executor import PagedCells
from moonlang.sim.stage import Checker
from moonlang.sim.tiers.channels import SimChannels
from moonlang.sim.tiers.memory import SharedStore, TierCells
from moonlang.sim.tiers.workload import Server, TierCase
from moonlang.sim.world import World

Watch = Callable[[], Sequence[Checker[World]]]


class TierServer(World):
    """One server of a TierCase, in its own time: it begins at 0."""

    def __init__(
        self,
        case: TierCase,
        server: Server,
        number: int,
        store: SharedStore,
        checkers: Sequence[Checker[World]],
        make_scheduler: Callable[[SchedulerConfig], Scheduler],
        trace: Callable[[str], None] | None,
    ) -> None:
        made: list[TierCells] = []

        def make_cells(num_pages: int, page_size: int) -> PagedCells:
            made.append(TierCells(num_pages, page_size))
            return made[0]

        base = replace(case.base, config=case.config(server), seed=case.seed + number)
        super().__init__(base, checkers, make_scheduler, trace, make_cells)
        rng = random.Random(f"channels {case.seed} {number}")
        self.server = server
        for time_ns in server.crowded_at_ns:
            self._at(time_ns, self._crowd)
        isolation = next((checker for checker in checkers if isinstance(checker, Isolation)), None)
        self._channels = SimChannels(made[0], server.tiers.host_slots, store, server.weather, rng, isolation)

    @property
    def tiers(self) -> Tiers:
        return cast(Tiers, self.scheduler.tiers)

    def arrive(self) -> None:
        self._channels.deliver(self.tiers, self.now_ns)

    def depart(self) -> None:
        while ops := self.tiers.ops(self.now_ns):
            for number, op in ops:
                self._say("tiers ", number, op)
                self._channels.submit(number, op, self.now_ns)

    def _crowd(self) -> None:
        inside.cache(self.scheduler).evict(self.config.num_pages)

    @property
    def elsewhere_ns(self) -> int | None:
        times = [time for time in (self._channels.next_ns, self.tiers.wake_ns(self.now_ns)) if time is not None]
        return min(times, default=None)


class TierWorld:
    """One case, run once. A server that is killed is not heard of again; what it has stored remains."""

    def __init__(
        self,
        case: TierCase,
        watch: Watch,
        make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.case = case
        store = SharedStore(case.store_pages)
        self.servers = [
            TierServer(case, server, i, store, watch(), make_scheduler, trace) for i, server in enumerate(case.servers)
        ]
        self.now_ns = 0

    @property
    def steps(self) -> int:
        return sum(server.steps for server in self.servers)

    @property
    def digest(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for server in self.servers:
            total.update(server.digest.encode())
        return total.hexdigest()

    def run(self) -> None:
        """Until nothing is left to happen."""
        alive = list(self.servers)
        while alive:
            turns = [(time, i, one) for i, one in enumerate(alive) if (time := _next_ns(one)) is not None]
            if not turns:
                break
            self.now_ns, _, turn = min(turns)
            if turn.server.end_ns is not None and self.now_ns >= turn.server.end_ns:
                alive.remove(turn)
                continue
            turn.go_on(self.now_ns - turn.server.begin_ns)
        for server in alive:
            server.end()


def _next_ns(one: TierServer) -> int | None:
    """On the clock of all."""
    next_ns = one.next_ns()
    return None if next_ns is None else next_ns + one.server.begin_ns
