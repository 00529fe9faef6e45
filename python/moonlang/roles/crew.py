"""Rank 0 as the leader of its crew: what it plans, the other ranks are told in bytes, and all compute it together.

With --elastic-ep-backend a rank that is lost does not end the server: those that are left load what it held, and go on
with the same bits. What was computed is lost with the pages, so the scheduler has it computed again.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import NamedTuple

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
from moonlang.distributed.survivors import Survivors, everyone, largest_tree
from moonlang.model_executor.executor import ThreadExecutor
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.runner import ModelRunner
from moonlang.model_executor.watching import WatchingExecutor
from moonlang.roles.experts import check_exchange, open_exchange
from moonlang.roles.pipeline import PipelineExecutor
from moonlang.roles.plan_lines import PlanOut, plan_sender, result_receiver

AGAIN_S = 30.0  # what ranks that have just agreed to meet again wait for each other

_log = log.get(__name__)


def placed(args: ServerArgs, place: int = 0) -> ServerArgs:
    """The arguments with the GPU of the rank that is number `place` among those of its replica on this host."""
    if args.device != "cuda":
        return args
    return dataclasses.replace(args, device=f"cuda:{args.base_gpu_id + place * args.gpu_id_step}")


class Shared(NamedTuple):
    """What a rank computes with. survivors: of an elastic server, how it sees the others."""

    runner: ModelRunner
    survivors: Survivors | None


def sharded_runner(
    args: ServerArgs,
    model: ModelConfig,
    seat: Seat,
    grammars: GrammarEngine | None = None,
    survivors: Survivors | None = None,
) -> Shared:
    """The ModelRunner of one rank; all ranks make theirs at the same time, also those that share only experts.

    survivors: when they meet again.
    """
    args = placed(args, seat.place)
    if args.device is not None and args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if seat.size == 1:  # of several that there were
        return Shared(ModelRunner(model, args, grammars), survivors)
    joined = join(seat)
    config = dataclasses.replace(model, shard=joined.shard, stage=joined.stage, experts_apart=joined.experts)
    sharers, exchange = joined.expert_group or joined.group, None
    if sharers is not None:
        exchange = open_exchange(args, model, seat if joined.pipe is None else seat.of_stage(), sharers)
    else:
        check_exchange(args, model)
    if survivors is None and sharers is not None and is_elastic(args):
        survivors = Survivors(seat, sharers, everyone if seat.replicas > 1 else largest_tree)
    runner = ModelRunner(config, args, grammars, joined.group, exchange, joined.pipe, joined.expert_group)
    return Shared(runner, survivors)


def fewer(args: ServerArgs, seat: Seat, tokens: int) -> ServerArgs:
    """The arguments of fewer ranks than there were, with as many tokens in their pages."""
    return dataclasses.replace(args, tp_size=seat.size, ep_size=1, max_total_tokens=tokens)


class Crew:
    """Runs plans as all ranks: hands each to the others, and computes its own share. See watching.WatchedRunner."""

    def __init__(self, args: ServerArgs, model: ModelConfig, seat: Seat) -> None:
        """Waits for the other ranks. PeerError when one does not come."""
        self._args, self._model, self._seat = args, model, seat
        self._line: PlanOut | None = plan_sender(args, seat)
        self._results = result_receiver(seat) if seat.stages > 1 else None
        self._encoder = msgspec.msgpack.Encoder()
        self._era = self._known_era = 0
        self._grammars: GrammarEngine
        self._own: ModelRunner | None = None
        self._survivors: Survivors | None = None

    def runner(self, grammars: GrammarEngine) -> ModelRunner:
        """Rank 0's own."""
        self._grammars = grammars
        self._own, self._survivors = sharded_runner(self._args, self._model, self._seat, grammars)
        return self._own

    def executor(self, depth: int) -> Executor:
        """What runs up to `depth` plans in flight."""
        if self._survivors is not None:
            return WatchingExecutor(self, depth)
        first = ThreadExecutor(self, depth)
        return first if self._results is None else PipelineExecutor(first, self._results)

    def fileno(self) -> int:
        """Of an elastic server: readable when a rank has ended."""
        assert self._survivors is not None
        return self._survivors.fileno()

    def tend(self) -> None:
        """Between two plans: go on without ranks that have ended, if any has."""
        if self._survivors is not None and self._survivors.broken:
            self._go_on(self._survivors, "A rank has ended.")

    def run(self, plan: StepPlan, progress: Progress) -> StepResult:
        """Progress of one rank says nothing of others with the same layers: pages count as written when the plan is
        done. Of a pipeline the layers of the first stage may leave before, when one rank has them."""
        self._known_era = plan.era
        if plan.era < self._era:  # made before anybody knew of the loss
            return StepResult(plan.plan_id, (), lost=True)
        try:
            return self._compute(plan, progress)
        except PeerError as lost:
            if self._survivors is None:
                raise
            reason = lost.message
        self._go_on(self._survivors, reason)
        return StepResult(plan.plan_id, (), lost=True)

    def close(self) -> None:
        """When the executor is closed: the other ranks end."""
        if self._line is not None:
            self._line.close()

    @property
    def _runner(self) -> ModelRunner:
        assert self._own is not None, "runner() comes first"
        return self._own

    def _compute(self, plan: StepPlan, progress: Progress) -> StepResult:
        if self._line is None:
            return self._runner.run(plan, progress)
        self._line.send(self._encoder.encode(plan))
        return self._runner.run(plan, progress if self._seat.size == self._seat.stages else None)

    def _go_on(self, survivors: Survivors, reason: str) -> None:
        """PeerError when there is not enough memory for as many pages."""
        begin_ns = monotonic_ns()
        _log.error("%s The other ranks go on; restart the server when all can come back.", reason)
        pages, size = self._runner.num_pages, self._runner.schema.page_size
        while True:
            self._leave()
            survivors.agree()
            try:
                self._meet(survivors, pages, (pages - 1) * size)
                break
            except PeerError:
                if not survivors.shrunk:
                    raise
        survivors.met()
        self._era = self._known_era + 1
        count, took_ms = len(survivors.members), (monotonic_ns() - begin_ns) // NS_PER_MS
        _log.info("%d of %d ranks compute on after %d ms.", count, self._seat.size, took_ms)

    def _leave(self) -> None:
        """Give up what was held in common, so that the others notice: weights and pages too, before as much is taken
        again."""
        self._own = None
        if self._line is not None:
            self._line.close()
            self._line = None
        gc.collect()

    def _meet(self, survivors: Survivors, pages: int, tokens: int) -> None:
        seat = survivors.seat
        assert seat is not None, "rank 0 is always needed"
        if seat.size > 1:
            self._line = plan_sender(self._args, seat, AGAIN_S)
        args = fewer(placed(self._args, self._seat.place), seat, tokens)
        self._own, _ = sharded_runner(args, self._model, seat, self._grammars, survivors)
        if self._runner.num_pages < pages:
            raise PeerError(f"There is no memory for {pages} pages any more.", hint="Start the server again.")
        self._runner.warm_up()
