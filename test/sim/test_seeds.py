"""Seeds and settings that must hold. `scripts/test seeds` runs many more of them through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim.run import combined_digest, run, run_seeds
from moonlang.sim.workload import draw

REGRESSIONS = tomllib.loads((Path(__file__).parent / "regressions.toml").read_text())["case"]


def holds(seed: int, **settings: Any) -> None:
    case = draw(seed)
    outcome = run(replace(case, config=replace(case.config, **settings)), again=True)
    assert outcome.failure is None, f"seed {seed} with {settings}: {outcome.failure}"


@pytest.mark.parametrize("seed", range(100_000, 100_006))
@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 1},
        {"depth": 3, "chunk_tokens": 3},
        {"depth": 2, "lanes": 2, "chunk_tokens": 7},
        {"depth": 4, "lanes": 3, "lane_rows": 2},
        {"radix": False},
        {"max_running": 1},
        {"max_running": 16, "chunk_tokens": None, "max_prefill_tokens": 8},
        {"num_pages": 12, "page_size": 4, "conservativeness": 0.0},
        {"num_pages": 40, "page_size": 1, "eviction": "lfu"},
        {"policy": "lpm", "prefix_wait_tokens": 2},
        {"policy": "dfs-weight"},
        {"policy": "lof", "max_queued": 3},
        {"policy": "priority", "priority": True, "preempt": True, "preempt_gap": 0, "max_running": 2},
    ],
    ids=str,
)
def test_settings_hold(settings: dict[str, Any], seed: int) -> None:
    holds(seed, **settings)


@pytest.mark.parametrize("case", REGRESSIONS, ids=lambda case: f"{case['seed']}")
def test_what_failed_once_holds_now(case: dict[str, Any]) -> None:
    holds(case["seed"], **case.get("settings", {}))


def test_workloads_reach_the_rare_states() -> None:
    """A simulator is as good as its workload: every way to end, and every way to be set back, must occur."""
    finishes: dict[str, int] = {}
    retractions = cached = 0

    class Census:
        def on_plan(self, world: Any, plan: Any) -> None: ...
        def on_delta(self, world: Any, delta: Any) -> None:
            if delta.finish is not None:
                name = f"{delta.finish.kind}{delta.finish.status or ''}"
                finishes[name] = finishes.get(name, 0) + 1

        def after_step(self, world: Any) -> None: ...
        def at_end(self, world: Any) -> None:
            nonlocal retractions, cached
            stats = world.scheduler.stats()
            retractions += stats.total_retractions
            cached += stats.total_cached_tokens

    for seed in range(60):
        run(draw(seed), watch=lambda: (Census(),))
    assert set(finishes) >= {"stop", "length", "abort400", "abort499", "abort503", "abort504"}
    assert retractions > 10
    assert cached > 1000


def test_the_hash_seed_of_the_interpreter_changes_nothing() -> None:
    command = [sys.executable, "-m", "moonlang.sim.main", "--seeds", "10", "--jobs", "1"]

    def digest(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        text = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout
        return text.split("digest ")[1].split(",")[0]

    here = combined_digest(outcome.digest for outcome in run_seeds(range(10), jobs=1, kinds="mixed"))
    assert digest("1") == digest("2") == here


def test_the_same_seed_draws_the_same_case_and_keeps_follow_ups_with_their_parents() -> None:
    assert draw(3) == draw(3) != draw(4)
    assert isinstance(draw(3).config, SchedulerConfig)
    case = next(case for case in map(draw, range(100)) if any(s.parent is not None for s in case.scripts))
    child = next(script for script in case.scripts if script.parent is not None)
    assert case.keep([child.index]).scripts == ()
    assert len(case.keep(range(child.index + 1)).scripts) == child.index + 1
