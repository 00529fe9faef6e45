"""All ranks of a server as threads, from the arguments that a user gives: what they share and exchange is real."""

from __future__ import annotations

import select
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from rank_threads import on_every_rank

from moonlang.base.errors import PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.prepare import prepare
from moonlang.config.server_args import ServerArgs
from moonlang.core.plan import StepPlan, StepResult
from moonlang.core.ports import Executor
from moonlang.core.seat import Seat
from moonlang.model_executor.executor import InlineExecutor
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles.crew import Crew
from moonlang.roles.grammars import grammar_engine
from moonlang.roles.members import Member
from moonlang.roles.seats import seats
from moonlang.roles.worker import WorkerRole

_DEADLINE_S = 120.0
_ENDED = "Rank 0 has ended"


class Planned:
    """What a PlanDriver needs, in front of an executor."""

    def __init__(self, runner: ModelRunner, executor: Executor) -> None:
        self.schema, self.num_pages, self.max_slots = runner.schema, runner.num_pages, runner.max_slots
        self.computed_by = runner.computed_by
        self._executor = executor

    def run(self, plan: StepPlan) -> StepResult:
        self._executor.submit(plan)
        assert select.select([self._executor.fileno()], [], [], _DEADLINE_S)[0], "no result"
        return self._executor.poll()[0]


Work = Callable[[Planned, int], list[object]]


def on_every_replica(work: Work, **flags: object) -> list[list[object]]:
    """work(ranks of a replica, its number) for each of them at the same time; what they return, by replica.

    flags: of the server; what is computed does not depend on the others.
    """
    given = {"device": "cpu", "grammar_backend": "none", "messaging_backend": "zmq", "skip_tokenizer_init": True}
    prepared = prepare(ServerArgs.create(**{"max_total_tokens": 1024, "max_running_requests": 8, **given, **flags}))
    args, model = prepared.args, prepared.model
    folder = Path(tempfile.mkdtemp(prefix="moonlang-ranks-"))  # its name is in /dev/shm, too
    try:
        places = list(seats(folder, args).values())
        if not places:
            runner = ModelRunner(model, args, grammar_engine(args, model))
            return [work(Planned(runner, InlineExecutor(runner)), 0)]
        done = threading.Barrier(args.dp_size)
        found = on_every_rank(len(places), lambda rank: _rank(args, model, places[rank], work, done))
        assert not list(Path("/dev/shm").glob(f"{folder.name}*")), "shared memory is left"
        return [answers for answers in found if answers is not None]
    finally:
        shutil.rmtree(folder)


def _rank(args: ServerArgs, model: ModelConfig, seat: Seat, work: Work, done: threading.Barrier) -> list[object] | None:
    if seat.rank % seat.replica_size:
        return _obey(WorkerRole(args, model, seat))
    grammars = grammar_engine(args, model)
    leader = (Member if seat.replicas > 1 else Crew)(args, model, seat)
    runner = leader.runner(grammars)
    runner.warm_up()
    executor = leader.executor(2)
    found = work(Planned(runner, executor), seat.replica)
    done.wait(_DEADLINE_S)  # until then the others need this one
    executor.close()
    leader.close()
    return found


def _obey(role: WorkerRole) -> None:
    try:
        while select.select(role.wait_fds, [], [], _DEADLINE_S)[0]:
            role.step(0)
    except PeerError as end:
        if _ENDED not in str(end):
            raise
    finally:
        role.close()
