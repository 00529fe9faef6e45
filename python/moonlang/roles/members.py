"""Replicas that share the experts of a model and nothing else (--enable-dp-attention): each serves requests of its own.

A replica is one rank, or several that share its attention. Its first rank plans, and tells the others in bytes, as rank
0 of a crew does; it also tells them when they take part in a step of other replicas.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence

import msgspec

from moonlang.base import log, registry
from moonlang.base.clock import NS_PER_MS, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.ports import Executor, GrammarEngine
from moonlang.core.seat import Seat
from moonlang.distributed.bells import Bells
from moonlang.distributed.join import join
from moonlang.distributed.survivors import Survivors
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.rounds import Meeting, RoundExecutor
from moonlang.model_executor.runner import ModelRunner
from moonlang.moe.placement import even
from moonlang.roles.crew import placed, sharded_runner
from moonlang.roles.experts import open_exchange
from moonlang.roles.plan_lines import PlanOut, plan_sender

_log = log.get(__name__)


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
        self._survivors: Survivors | None = None

    def runner(self, grammars: GrammarEngine) -> ModelRunner:
        """This rank's own; all ranks of all replicas make theirs at the same time."""
        self._runner, self._survivors = sharded_runner(self._args, self._model, self._seat, grammars)
        return self._runner

    def executor(self, depth: int) -> Executor:
        """What runs up to `depth` plans in flight."""
        meeting = _meeting(self._seat, self._bells)
        rejoins = None if self._survivors is None else Rejoins(self._args, self._model, self._runner, self._survivors)
        return RoundExecutor(self, depth, meeting, rejoins)

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


class Rejoins:
    """Of an elastic server: how a replica goes on with those that are left. See rounds.Others."""

    def __init__(self, args: ServerArgs, model: ModelConfig, runner: ModelRunner, survivors: Survivors) -> None:
        """A replica is one rank with pages and requests of its own: only the experts have to be shared anew."""
        self._args, self._model = args, model
        self._runner = runner
        self._survivors = survivors

    @property
    def broken(self) -> bool:
        return self._survivors.broken

    def fileno(self) -> int:
        return self._survivors.fileno()

    def meet_again(self, stop: Callable[[], bool]) -> Meeting | None:
        """PeerError when that cannot be, and none has been lost on the way."""
        begin_ns, survivors = monotonic_ns(), self._survivors
        while True:
            self._runner.release()
            gc.collect()  # so that the others notice, and weights go before as much is taken again
            if not survivors.agree(stop):
                return None
            try:
                meeting = self._meet(survivors)
                break
            except PeerError:
                if not survivors.shrunk:
                    raise
        survivors.met()
        count, took_ms = len(survivors.members), (monotonic_ns() - begin_ns) // NS_PER_MS
        _log.info("%d of the replicas go on after %d ms; restart the server when all can come back.", count, took_ms)
        return meeting

    def _meet(self, survivors: Survivors) -> Meeting:
        seat = survivors.seat
        assert seat is not None, "all that are left go on"
        bells = Bells(seat.bells, seat.replica, seat.replicas)  # before anybody may ring
        try:
            args = dataclasses.replace(placed(self._args), tp_size=seat.size, ep_size=1, dp_size=seat.size)
            if seat.size == 1:
                self._runner.rejoin(self._model, args, None, None)
            else:
                joined = join(seat)
                sharers = joined.expert_group
                assert sharers is not None, "replicas share experts"
                experts, copies = self._model.num_experts or 0, self._model.redundant_experts
                slots = slots_of_those_left(experts, copies, survivors.first_size, survivors.members)
                model = dataclasses.replace(self._model, experts_apart=joined.experts, expert_slots=slots)
                self._runner.rejoin(model, args, open_exchange(args, model, seat, sharers), sharers)
            return _meeting(seat, bells)
        except BaseException:
            bells.close()
            raise


def slots_of_those_left(experts: int, copies: int, size: int, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """By rank of `members`, of `size` that there were, the experts that it holds: those that it held at first, and some
    of those of which the last copy is lost. copies: further ones that there were.

    A function of who is left alone, however they came to know it: all have to come to the same.
    """
    first = even(experts, size, copies)
    held = [list(first.slots[rank]) for rank in members]
    kept = {expert for some in held for expert in some}
    for expert in range(experts):
        if expert not in kept:
            min(held, key=len).append(expert)
    return tuple(map(tuple, held))


def _meeting(seat: Seat, bells: Bells) -> Meeting:
    """Of the first ranks of all replicas."""
    place = msgspec.structs.replace(seat, rank=seat.replica, size=seat.replicas, replicas=1, part="leaders")
    return Meeting(registry.find("distributed", seat.backend).BACKEND(place), bells)
