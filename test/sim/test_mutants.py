"""The simulator finds planted bugs, and each checker can fail on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim.checkers import bounds, delivery, isolation, liveness, order, pages, radix, replay
from moonlang.sim.mutants import MUTANTS, Mutant, hunt, is_stale, load
from moonlang.sim.pd.mutants import MUTANTS as PD_MUTANTS
from moonlang.sim.run import run, shrink
from moonlang.sim.stage import Checker
from moonlang.sim.violation import Violation
from moonlang.sim.workload import draw
from moonlang.sim.world import World

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
MOST_SEEDS = 300


@pytest.mark.parametrize("mutant", [m for m in (*MUTANTS, *PD_MUTANTS) if not m.equivalent], ids=lambda m: m.name)
def test_mutants_are_caught(mutant: Mutant) -> None:
    assert not is_stale(mutant), "the brain has changed: bring the mutants in moonlang.sim up to date"
    assert hunt(mutant, range(MOST_SEEDS)).caught


@pytest.mark.parametrize(
    ("name", "watch", "checker"),
    [
        ("page leak", lambda: (pages.Pages(),), "pages"),
        ("lock leak", lambda: (radix.Radix(),), "radix"),
        ("double delivery", lambda: (delivery.Delivery(),), "delivery"),
        ("one salt", lambda: (isolation.Isolation(),), "isolation"),
        ("over budget", lambda: (bounds.Bounds(),), "bounds"),
        ("low priority first", lambda: (order.Order(),), "order"),
        ("late deadline", lambda: (liveness.Liveness(),), "liveness"),
        ("stale table", lambda: (), "executor"),
    ],
)
def test_every_checker_can_fail_alone(name: str, watch: Callable[[], tuple[Checker[World], ...]], checker: str) -> None:
    verdict = hunt(BY_NAME[name], range(60), watch)
    assert verdict.violation is not None
    assert verdict.violation[0] == checker


def test_replay_sees_a_scheduler_that_remembers_another_run() -> None:
    case = draw(1)
    world = World(case, ())
    world.run()
    replay.check(World(case, ()), world.digest)
    with pytest.raises(Violation, match="second run"):
        replay.check(World(draw(2), ()), world.digest)


def test_a_mutant_leaves_the_real_brain_alone() -> None:
    planted = load(BY_NAME["page leak"])
    assert planted is not Scheduler
    assert run(draw(0), make_scheduler=planted).failure is not None
    assert run(draw(0)).failure is None
    assert isinstance(Scheduler(SchedulerConfig(num_pages=4)), Scheduler)


def test_a_failing_case_shrinks_to_few_requests() -> None:
    planted = load(BY_NAME["one token more"])
    case = next(case for case in map(draw, range(20)) if run(case, make_scheduler=planted).failure is not None)
    small = shrink(case, "delivery", make_scheduler=planted)
    assert len(small.scripts) < min(4, len(case.scripts))
    assert run(small, make_scheduler=planted).failure is not None
