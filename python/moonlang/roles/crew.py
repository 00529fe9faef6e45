"""Rank 0 as the leader of its crew: what it plans, the other ranks are told in bytes, and all compute it together.

With --elastic-ep-backend a rank that is lost does not end the server: rank 0 loads what the others held, and goes on
alone with the same bits. What was computed is lost with the pages, so the scheduler has it computed again.
"""

from __future__ import annotations

import dataclasses
import gc

import msgspec
import torch

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.config.experts import is_elastic
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.ports import Executor, GrammarEngine
from moonlang.core.seat import Seat
from moonlang.distributed.join import join
from moonlang.model_executor.executor import ThreadExecutor
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.experts import open_exchange
from moonlang.roles.pipeline import PipelineExecutor
from moonlang.roles.plan_lines import PlanOut, plan_sender, result_receiver

_log = log.get(__name__)


def placed(args: ServerArgs, place: int = 0) -> ServerArgs:
    """The arguments with the GPU of the rank that is number `place` among those of its replica on this host."""
    if args.device != "cuda":
        return args
    return dataclasses.replace(args, device=f"cuda:{args.base_gpu_id + place * args.gpu_id_step}")


def sharded_runner(
    args: ServerArgs, model: ModelConfig, seat: Seat, grammars: GrammarEngine | None = None
) -> ModelRunner:
    """The ModelRunner of one rank; all ranks make theirs at the same time."""
    args = placed(args, seat.rank % seat.local_size)
    if args.device is not None and args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    joined = join(seat)
    config = dataclasses.replace(model, shard=joined.shard, stage=joined.stage)
    exchange = None if joined.group is None else open_exchange(args, model, seat, joined.group)
    return ModelRunner(config, args, grammars, joined.group, exchange, joined.pipe)


class Crew:
    """Runs plans as all ranks: hands each to the others, and computes its own share. See executor.Runner."""

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        """Waits for the other ranks. PeerError when one does not come."""
        self._args, self._model, self._seat = args, model, seat
        self._line: PlanOut | None = plan_sender(args, seat)
        self._results = result_receiver(seat) if seat.stages > 1 else None
        self._encoder = msgspec.msgpack.Encoder()
        self._era = 0
        self._grammars: GrammarEngine
        self._runner: ModelRunner

    def runner(self, grammars: GrammarEngine) -> ModelRunner:
        """Rank 0's own."""
        self._grammars = grammars
        self._runner = sharded_runner(self._args, self._model, self._seat, grammars)
        return self._runner

    def executor(self, depth: int) -> Executor:
        """What runs up to `depth` plans in flight."""
        first = ThreadExecutor(self, depth)
        return first if self._results is None else PipelineExecutor(first, self._results)

    def run(self, plan: StepPlan, progress: Progress) -> StepResult:
        """Progress of one rank says nothing of others with the same layers: pages count as written when the plan is
        done. Of a pipeline the layers of the first stage may leave before, when one rank has them."""
        if plan.era < self._era:  # made before anybody knew of the loss
            return StepResult(plan.plan_id, (), lost=True)
        if self._line is None:
            return self._runner.run(plan, progress)
        try:
            self._line.send(self._encoder.encode(plan))
            return self._runner.run(plan, progress if self._seat.size == self._seat.stages else None)
        except PeerError as lost:
            if not is_elastic(self._args):
                raise
            reason = lost.message
        self._go_on_alone(reason)
        self._era = plan.era + 1
        return StepResult(plan.plan_id, (), lost=True)

    def _go_on_alone(self, reason: str) -> None:
        """PeerError when there is not enough memory for one rank to do so."""
        begin_ns = monotonic_ns()
        _log.error("%s Rank 0 goes on alone; restart the server when the others can come back.", reason)
        pages, size = self._runner.num_pages, self._runner.schema.page_size
        del self._runner
        self._line = None  # which ends the ranks that are left
        gc.collect()  # weights and pages, before as much is taken again
        args = dataclasses.replace(self._args, tp_size=1, ep_size=1, max_total_tokens=(pages - 1) * size)
        self._runner = ModelRunner(self._model, placed(args), self._grammars)
        if self._runner.num_pages < pages:
            raise PeerError(f"One rank has no memory for {pages} pages.", hint="Start the server again.")
        self._runner.warm_up()
        _log.info("Rank 0 has been alone for %d ms, and is ready.", (monotonic_ns() - begin_ns) // NS_PER_MS)
