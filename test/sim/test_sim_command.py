"""`moonlang sim`: the summary, and what a failure tells."""

from __future__ import annotations

import pytest

from moonlang.sim import main as command
from moonlang.sim import run as runs
from moonlang.sim.mutants import MUTANTS, load
from moonlang.sim.pd.museum import EXHIBITS
from moonlang.sim.pd.workload import draw as draw_pd
from moonlang.sim.world import World


def test_many_seeds_give_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seeds", "5", "--start", "40", "--jobs", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("5 seeds from 40, 0 failed, ")
    assert "digest" in line


def test_one_seed_can_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seed", "40", "--trace"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("send", "plan", "done", "delta", "seed 40 holds"))


def test_prefill_and_decode_servers_can_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--world", "pd", "--seed", "1", "--trace"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("client sends", "Want(", "writes to page", "Landed(", "seed 1 holds"))


def test_a_failure_of_a_pair_shrinks_to_few_requests_and_faults(capsys: pytest.CaptureFixture[str]) -> None:
    exhibit = next(exhibit for exhibit in EXHIBITS if exhibit.mutant.name == "sglang#9726")
    planted = load(exhibit.mutant)
    case = draw_pd(exhibit.first)
    outcome = runs.run(case, make_scheduler=planted)
    assert outcome.failure is not None
    small = runs.shrink(case, outcome.failure[0], make_scheduler=planted)
    assert 1 <= len(small.indexes) <= 4 < len(case.indexes)


def test_a_failure_comes_with_the_command_that_repeats_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = load(next(mutant for mutant in MUTANTS if mutant.name == "one token more"))
    monkeypatch.setattr(
        runs, "World", lambda case, watch, make_scheduler=None, trace=None: World(case, watch, planted, trace)
    )
    assert command.main(["--seeds", "8", "--jobs", "1"]) == 1
    text = capsys.readouterr().out
    assert "fails delivery" in text
    repeat = next(line for line in text.splitlines() if "moonlang sim --world" in line)
    assert command.main(repeat.split()[2:-1]) == 1
    assert "fails delivery" in capsys.readouterr().out
