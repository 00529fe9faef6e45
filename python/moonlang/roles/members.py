"""Replicas that share the experts of a model and nothing else (--enable-dp-attention): each serves requests of its own.

A replica is one rank, or several that share its attention. Its first rank plans, and tells the others in bytes, as rank
0 of a crew does; it also tells them when they take part in a step of other replicas.
"""

from __future__ import annotations

import msgspec

from moonlang.base import registry
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.ports import Executor, GrammarEngine
from moonlang.core.seat import Seat
from moonlang.distributed.bells import Bells
from moonlang.distributed.group import Group
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.rounds import RoundExecutor
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.crew import sharded_runner
from moonlang.roles.plan_lines import PlanOut, plan_sender


class Member:
    """The first rank of a replica. It plans by itself; its steps happen together with those of the other replicas.

    See executor.Runner.
    """

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        """Waits for the other ranks of its replica. PeerError when one does not come."""
        self._args, self._model, self._seat = args, model, seat
        self._bells = Bells(seat.bells, seat.replica, seat.replicas)
        self._line: PlanOut | None = plan_sender(args, seat) if seat.replica_size > 1 else None
        self._encoder = msgspec.msgpack.Encoder()
        self._runner: ModelRunner

    def runner(self, grammars: GrammarEngine) -> ModelRunner:
        """This rank's own; all ranks of all replicas make theirs at the same time."""
        self._runner, _ = sharded_runner(self._args, self._model, self._seat, grammars)
        return self._runner

    def executor(self, depth: int) -> Executor:
        """What runs up to `depth` plans in flight."""
        return RoundExecutor(self, depth, _leaders(self._seat), self._bells)

    def run(self, plan: StepPlan, progress: Progress) -> StepResult:
        """Progress of one rank of several says nothing of the others: pages count as written when the plan is done."""
        if self._line is None:
            return self._runner.run(plan, progress)
        self._line.send(self._encoder.encode(plan))
        return self._runner.run(plan)

    def close(self) -> None:
        """When the executor is closed: the other ranks of the replica end."""
        if self._line is not None:
            self._line.close()


def _leaders(seat: Seat) -> Group:
    """The first ranks of all replicas."""
    place = msgspec.structs.replace(seat, rank=seat.replica, size=seat.replicas, replicas=1, part="leaders")
    return registry.find("distributed", seat.backend).BACKEND(place)
