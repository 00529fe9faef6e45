"""A checker that looks at nothing: the others override what they care about."""

from __future__ import annotations

from typing import Generic, TypeVar

from moonlang.core.messages import TokenDelta
from moonlang.core.plan import SlotStart, StepPlan
from moonlang.sim.stage import Stage

Seen = TypeVar("Seen")

_EVERY_STEP_PAGES = 200  # pools up to this size are walked after every step, larger ones less often
_SOME_STEPS = 16


class Watch(Generic[Seen]):
    """Does nothing at each hook of `stage.Checker`."""

    def on_plan(self, seen: Seen, plan: StepPlan, /) -> None:
        return None

    def on_delta(self, seen: Seen, delta: TokenDelta, /) -> None:
        return None

    def after_step(self, seen: Seen, /) -> None:
        return None

    def at_end(self, seen: Seen, /) -> None:
        return None


def is_due(stage: Stage) -> bool:
    """Whether this step is one of those after which the whole pool is walked."""
    return stage.config.num_pages <= _EVERY_STEP_PAGES or stage.steps % _SOME_STEPS == 0


def comes_complete(start: SlotStart, plan: StepPlan) -> bool:
    """Whether this request begins behind its prompt: all of it and the first token have come from another server, and
    it has had its pages before; it takes nothing from others but a slot."""
    row = next(row for row in plan.rows if row.slot == start.slot)
    return row.start == start.prompt_len and len(start.tokens) == start.prompt_len + 1
