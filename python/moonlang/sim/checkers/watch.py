"""A checker that looks at nothing: the others override what they care about."""

from __future__ import annotations

from moonlang.core.messages import TokenDelta
from moonlang.core.plan import StepPlan
from moonlang.sim.world import World

_EVERY_STEP_PAGES = 200  # pools up to this size are walked after every step, larger ones less often
_SOME_STEPS = 16


class Watch:
    """Does nothing at each hook of `world.Checker`."""

    def on_plan(self, world: World, plan: StepPlan) -> None:
        return None

    def on_delta(self, world: World, delta: TokenDelta) -> None:
        return None

    def after_step(self, world: World) -> None:
        return None

    def at_end(self, world: World) -> None:
        return None


def is_due(world: World) -> bool:
    """Whether this step is one of those after which the whole pool is walked."""
    return world.case.config.num_pages <= _EVERY_STEP_PAGES or world.steps % _SOME_STEPS == 0
