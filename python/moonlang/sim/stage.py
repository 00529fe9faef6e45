"""What a checker of one server sees of it, in whatever world that server lives."""

from __future__ import annotations

from typing import Protocol, TypeVar

from moonlang.core.messages import TokenDelta
from moonlang.core.plan import StepPlan
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig

Seen = TypeVar("Seen", contravariant=True)


class InFlight(Protocol):
    """The plans that are on their way through an executor; len(): how many."""

    def __len__(self) -> int: ...
    @property
    def plans(self) -> list[StepPlan]:
        """Oldest first."""
        ...


class Stage(Protocol):
    """One scheduler with its executor. steps: how often it has been stepped."""

    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def config(self) -> SchedulerConfig: ...
    @property
    def pipeline(self) -> InFlight: ...
    @property
    def steps(self) -> int: ...
    @property
    def now_ns(self) -> int: ...


class Checker(Protocol[Seen]):
    """Looks on and raises Violation. Called after each plan, each delta, each step, and when everything has drained.

    What it looks at is one server (`Stage`) or a world.
    """

    def on_plan(self, seen: Seen, plan: StepPlan, /) -> None: ...
    def on_delta(self, seen: Seen, delta: TokenDelta, /) -> None: ...
    def after_step(self, seen: Seen, /) -> None: ...
    def at_end(self, seen: Seen, /) -> None: ...
