"""Rank 0 as the leader of its crew: what it plans, the other ranks are told in bytes, and all compute it together."""

from __future__ import annotations

import dataclasses

import msgspec
import torch

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


def sharded_runner(
    args: ServerArgs, model: ModelConfig, seat: Seat, grammars: GrammarEngine | None = None
) -> ModelRunner:
    """The ModelRunner of one rank; all ranks make theirs at the same time."""
    if args.device == "cuda":
        place = seat.rank % seat.local_size
        args = dataclasses.replace(args, device=f"cuda:{args.base_gpu_id + place * args.gpu_id_step}")
        torch.cuda.set_device(args.device)
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
