"""Rank 0 as the leader of its crew: what it plans, the other ranks are told in bytes, and all compute it together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from moonlang.base import registry
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import Shard
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.ports import GrammarEngine
from moonlang.core.seat import Seat
from moonlang.messaging.plan_line import PlanSender
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.runner import ModelRunner

_PATIENCE_S = 300.0
_SHARED_MEMORY = Path("/dev/shm")


def seats(directory: Path, args: ServerArgs) -> dict[int | None, Seat]:
    """By rank; none when one process computes the whole model."""
    size = args.tp_size
    if size == 1:
        return {}
    return {
        rank: Seat(
            rank=rank,
            size=size,
            meeting=str(_SHARED_MEMORY / f"{directory.name}-ranks"),
            plans=str(directory / "plans"),
            backend="shared_memory" if args.attention_backend == "cpu" else "gloo",
            patience_s=args.dist_timeout or _PATIENCE_S,
            local_size=size,
        )
        for rank in range(size)
    }


def sharded_runner(
    args: ServerArgs, model: ModelConfig, seat: Seat, grammars: GrammarEngine | None = None
) -> ModelRunner:
    """The ModelRunner of one rank; all ranks make theirs at the same time."""
    group = registry.find("distributed", seat.backend).BACKEND(seat)
    config = dataclasses.replace(model, shard=Shard(seat.rank, seat.size))
    return ModelRunner(config, args, grammars, group)


class Crew:
    """Runs plans as all ranks: hands each to the others, and computes its own share. See executor.Runner."""

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        """Waits for the other ranks. PeerError when one does not come."""
        self._args, self._model, self._seat = args, model, seat
        self._line = PlanSender(seat.plans, seat.size - 1)
        self._encoder = msgspec.msgpack.Encoder()
        self._runner: ModelRunner

    def runner(self, grammars: GrammarEngine) -> ModelRunner:
        """Rank 0's own."""
        self._runner = sharded_runner(self._args, self._model, self._seat, grammars)
        return self._runner

    def run(self, plan: StepPlan, progress: Progress) -> StepResult:
        """Progress of one rank says nothing of the others: pages count as written when the plan is done."""
        self._line.send(self._encoder.encode(plan))
        return self._runner.run(plan)
