"""Faults from other engines' issue lists, planted in ours: the simulator finds them. The test's id is the issue.

The long form, every exhibit from seed 0 on: `moonlang sim --mutants --world pd --seeds 1000`.
"""

from __future__ import annotations

import pytest

from moonlang.sim.mutants import hunt, is_stale
from moonlang.sim.pd.museum import EXHIBITS, MOST_SEEDS, Exhibit

_NEAR = 20  # cases from the one that caught it last; all of them are searched when the workload has changed


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.mutant.name)
def test_a_fault_of_another_engine_is_caught(exhibit: Exhibit) -> None:
    assert not is_stale(exhibit.mutant), "the brain has changed: bring sim/pd/museum.py up to date"
    verdict = hunt(exhibit.mutant, range(exhibit.first, exhibit.first + _NEAR))
    assert verdict.caught or hunt(exhibit.mutant, range(MOST_SEEDS)).caught


def test_the_museum_is_large_enough_and_names_every_issue_once() -> None:
    names = [exhibit.mutant.name for exhibit in EXHIBITS]
    assert len(names) >= 10
    assert len(set(names)) == len(names)
