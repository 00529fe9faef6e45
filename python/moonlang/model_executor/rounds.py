"""Plans of several replicas that share experts: each runs its own, but all of them run a step at a time together.

A step needs every replica, because it may hold experts that somebody's tokens want. So they meet before each step and
say whether they have a plan. While one has, all take part, those without a plan with one that has no rows: a runner
that shares experts computes a token that means nothing for it. When nobody has one they wait, each for a plan of its
own or for the bell of another. No brain knows of this.
"""

from __future__ import annotations

import queue
import select
from typing import Final

import torch

from moonlang.base.wakeup import Wakeup
from moonlang.core.plan import StepPlan
from moonlang.distributed.bells import Bells
from moonlang.distributed.group import Group
from moonlang.model_executor.executor import Runner, ThreadExecutor

_NOTHING: Final = 0
_PLAN: Final = 1
_END: Final = 2
_NOBODYS: Final = StepPlan(-1, 0, (), ())


class RoundExecutor(ThreadExecutor):
    """See Executor. phase: the number of times that all have waited together, the same in every replica."""

    def __init__(self, runner: Runner, depth: int, group: Group, bells: Bells) -> None:
        """group: those who plan for the replicas, one each. Owns the bells."""
        self._group = group
        self._bells = bells
        self._filled = Wakeup()
        self._phase = 0
        self._ended = False
        super().__init__(runner, depth)

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._filled.set()

    def close(self) -> None:
        """Finish the step that is under way. The other replicas end too: without this one they cannot go on."""
        self._plans.put(None)
        self._filled.set()
        self._thread.join()
        self._done.close()
        self._filled.close()
        self._bells.close()

    def _work(self) -> None:
        try:
            while not self._ended:
                self._wait()
                while self._step():
                    pass
                self._phase += 1
        except BaseException as error:  # noqa: BLE001 - handed over to the polling thread, which raises it
            self._done.put(error)

    def _wait(self) -> None:
        """Until there is something to do somewhere."""
        poll = select.poll()
        poll.register(self._filled.fileno(), select.POLLIN)
        poll.register(self._bells.fileno(), select.POLLIN)
        while True:
            begun = self._bells.heard(self._phase)
            if not self._plans.empty():
                self._bells.ring(self._phase)
                return
            if begun:
                return
            self._filled.clear()
            if self._plans.empty():
                poll.poll()

    def _step(self) -> bool:
        """One step of all replicas; False when nobody has a plan, or one ends."""
        state, plan = _NOTHING, None
        try:
            plan = self._plans.get_nowait()
            state = _END if plan is None else _PLAN
        except queue.Empty:
            pass
        states = self._group.all_gather(torch.tensor(state)).tolist()
        if _END in states:
            self._ended = True
            return False
        if _PLAN not in states:
            return False
        result = self._runner.run(plan or _NOBODYS, self._progress)
        if plan is not None:
            self._done.put(result)
        return True
