"""Plans of several replicas that share experts: each runs its own, but all of them run a step at a time together.

A step needs every replica, because it may hold experts that somebody's tokens want. So they meet before each step and
say whether they have a plan. While one has, all take part, those without a plan with one that has no rows: a runner
that shares experts computes a token that means nothing for it. When nobody has one they wait, each for a plan of its
own or for the bell of another. No brain knows of this.

When a replica is lost, those that are left may meet again, and each runs the plan that was under way once more. That
leaves no trace of the first time: a plan that has not reached its end has written pages, which it writes again with the
same values, and has started slots, which it starts again.
"""

from __future__ import annotations

import queue
import select
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import torch

from moonlang.base import log
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.core.plan import StepPlan
from moonlang.distributed.bells import Bells
from moonlang.distributed.group import Group
from moonlang.model_executor.executor import Runner, ThreadExecutor

_NOTHING: Final = 0
_PLAN: Final = 1
_END: Final = 2
_NOBODYS: Final = StepPlan(-1, 0, (), ())

_log = log.get(__name__)


class Meeting(NamedTuple):
    """How replicas step together. group: those who plan for them, one each; bells: how they wake each other."""

    group: Group
    bells: Bells


class Others(Protocol):
    """Replicas that may be lost."""

    @property
    def broken(self) -> bool:
        """Whether one has been lost since all met."""
        ...

    def fileno(self) -> int:
        """Readable when one has been lost."""
        ...

    def meet_again(self, stop: Callable[[], bool]) -> Meeting | None:
        """All that are left, when what they had in common is closed; None when told to `stop`."""
        ...


class RoundExecutor(ThreadExecutor):
    """See Executor. phase: the number of times that all have waited together, the same in every replica."""

    def __init__(self, runner: Runner, depth: int, meeting: Meeting, others: Others | None = None) -> None:
        """Owns the bells of every meeting. others: None when the loss of one is the end of all."""
        self._meeting: Meeting | None = meeting
        self._others = others
        self._filled = Wakeup()
        self._phase = 0
        self._plan: StepPlan | None = None  # taken, and not run yet
        self._is_last = False  # no plan comes any more
        self._closing = self._ended = False
        super().__init__(runner, depth)

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._filled.set()

    def close(self) -> None:
        """Finish the step that is under way. Unless they may be lost the other replicas end, too."""
        self._closing = True
        self._plans.put(None)
        self._filled.set()
        self._thread.join()
        self._done.close()
        self._filled.close()
        self._part()

    def _work(self) -> None:
        try:
            while not self._ended:
                try:
                    self._go_on()
                    continue
                except PeerError as lost:
                    if self._others is None:
                        raise
                    _log.info("%s Those that are left meet again.", lost.message)
                self._meet_again(self._others)
        except BaseException as error:  # noqa: BLE001 - handed over to the polling thread, which raises it
            self._done.put(error)

    def _go_on(self) -> None:
        """As many steps as there are, and then a wait."""
        assert self._meeting is not None
        group, bells = self._meeting
        while self._step(group):
            pass
        self._phase += 1
        if not self._ended:
            self._wait(bells)

    def _meet_again(self, others: Others) -> None:
        self._part()
        self._meeting = others.meet_again(lambda: self._closing)
        self._phase = 0
        self._ended = self._meeting is None

    def _part(self) -> None:
        if self._meeting is not None:
            self._meeting.bells.close()
            self._meeting = None

    def _wait(self, bells: Bells) -> None:
        """Until there is something to do somewhere. PeerError when there is one replica less."""
        poll = select.poll()
        poll.register(self._filled.fileno(), select.POLLIN)
        poll.register(bells.fileno(), select.POLLIN)
        if self._others is not None:
            poll.register(self._others.fileno(), select.POLLIN)
        while True:
            begun = bells.heard(self._phase)
            if not self._plans.empty():
                bells.ring(self._phase)
                return
            if begun:
                return
            if self._others is not None and self._others.broken:
                raise PeerError("A rank has ended while all were waiting.")
            self._filled.clear()
            if self._plans.empty():
                poll.poll()

    def _step(self, group: Group) -> bool:
        """One step of all replicas; False when nobody has a plan, or one ends."""
        state = self._take()
        states = group.all_gather(torch.tensor(state)).tolist()
        if _END in states:
            if self._others is not None and state != _END:
                raise PeerError("A rank ends.")
            self._ended = True
            return False
        if _PLAN not in states:
            return False
        result = self._runner.run(self._plan or _NOBODYS, self._progress)
        if self._plan is not None:
            self._plan = None
            self._done.put(result)
        return True

    def _take(self) -> int:
        """The next plan, unless the last one has not been run; what there is to say of it."""
        if self._plan is None and not self._is_last:
            try:
                self._plan = self._plans.get_nowait()
                self._is_last = self._plan is None
            except queue.Empty:
                return _NOTHING
        return _PLAN if self._plan is not None else _END
