"""The simulated muscle: right plans give the oracle's tokens, wrong ones are refused or give wrong tokens."""

from __future__ import annotations

import pytest

from moonlang.core.plan import Row, RowResult, SlotStart, StepPlan
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.sim.chain import ChainModel
from moonlang.sim.executor import ChainExecutor, PagedCells, Pipeline
from moonlang.sim.violation import Violation

MODEL = ChainModel(vocab_size=1000, eos_token_ids=(0, 1), eos_per_mille=0)
SAMPLING = SamplingParams(seed=7)
PROMPT = (11, 12, 13, 14, 15, 16)
RIGHT = MODEL.answer(PROMPT, SAMPLING, 4)[0]


class Bench:
    """An executor with pages of 2 tokens and a running plan id."""

    def __init__(self, poison: dict[int, int] | None = None) -> None:
        self.executor = ChainExecutor(MODEL, PagedCells(10, 2), num_slots=2, poison=poison or {})
        self.plan_id = 0

    def step(self, *rows: Row, starts: tuple[SlotStart, ...] = ()) -> list[RowResult]:
        plan = StepPlan(self.plan_id, 0, starts, rows)
        self.plan_id += 1
        return list(self.executor.run(plan).rows)

    def begin(self, slot: int, epoch: int, pages: tuple[int, ...], start: int = 0) -> list[RowResult]:
        row = Row(slot, epoch, start, len(PROMPT) - start, PROMPT[start:], True, 0, pages)
        return self.step(row, starts=(SlotStart(slot, epoch, len(PROMPT), PROMPT, SAMPLING),))


def decode(position: int, *pages: int, at: int = 3) -> Row:
    return Row(0, 0, position, 1, (), True, at if pages else 0, pages)


def test_prefill_and_decode_give_the_right_tokens() -> None:
    bench = Bench()
    got = [bench.begin(0, 0, (1, 2, 3))[0].tokens[0]]
    got += [bench.step(row)[0].tokens[0] for row in (decode(6, 4), decode(7), decode(8, 5, at=4))]
    assert got == RIGHT


def test_a_cached_prefix_and_chunks_give_the_same_token() -> None:
    bench = Bench()
    bench.begin(0, 0, (1, 2, 3))
    assert bench.begin(1, 1, (1, 2, 7), start=4)[0].tokens == (RIGHT[0],)
    start = SlotStart(1, 2, len(PROMPT), PROMPT, SAMPLING)
    bench.step(Row(1, 2, 0, 3, PROMPT[:3], False, 0, (8, 9)), starts=(start,))
    assert bench.step(Row(1, 2, 3, 3, PROMPT[3:], True, 2, (7,)))[0].tokens == (RIGHT[0],)


def test_a_wrong_page_in_the_middle_gives_a_wrong_token() -> None:
    bench = Bench()
    bench.begin(0, 0, (1, 2, 3))
    assert bench.begin(1, 1, (1, 3, 7), start=4)[0].tokens != (RIGHT[0],)


def test_a_page_that_was_given_to_somebody_else_gives_a_wrong_token() -> None:
    bench = Bench()
    bench.begin(0, 0, (1, 2, 3))
    thief = SlotStart(1, 1, 2, (99, 98), SamplingParams(seed=8))
    bench.step(Row(1, 1, 0, 2, (99, 98), True, 0, (2,)), starts=(thief,))
    assert bench.step(decode(6, 4))[0].tokens != (RIGHT[1],)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(0, 1, 6, 1, (), True, 3, (4,)), "tenant"),
        (Row(1, 0, 0, 1, (5,), True, 0, (4,)), "tenant"),
        (Row(0, 0, 5, 1, (), True), "leaves its token out"),
        (Row(0, 0, 6, 1, (RIGHT[0] + 1,), True, 3, (4,)), "other tokens"),
        (Row(0, 0, 6, 2, (RIGHT[0], 5), True, 3, (4,)), "nobody knows"),
        (Row(0, 0, 6, 1, (), True), "does not fit"),
        (Row(0, 0, 6, 1, (), True, 4, (4,)), "table of 3 pages"),
        (Row(0, 0, 6, 1, (), True, 3, (0,)), "outside"),
        (Row(0, 0, 6, 1, (), True, 3, (1,)), "page twice"),
        (Row(0, 0, 5, 1, (PROMPT[5],), False), "are computed"),
    ],
)
def test_rows_against_the_rules_are_refused(row: Row, reason: str) -> None:
    bench = Bench()
    bench.begin(0, 0, (1, 2, 3))
    with pytest.raises(Violation, match=reason):
        bench.step(row)


def test_pages_without_cells_are_refused() -> None:
    with pytest.raises(Violation, match="read in full but holds 0"):
        Bench().begin(0, 0, (1, 2, 3), start=4)


def test_the_old_epoch_and_plans_out_of_order_are_refused() -> None:
    bench = Bench()
    bench.begin(0, 0, (1, 2, 3))
    with pytest.raises(Violation, match="old epoch"):
        bench.begin(0, 0, (4, 5, 6))
    bench.plan_id += 1
    with pytest.raises(Violation, match="follows plan"):
        bench.step(decode(6, 4))


def test_a_poisoned_row_fails_and_so_do_those_planned_behind_it() -> None:
    bench = Bench(poison={SAMPLING.seed: 0})
    assert "not a number" in bench.begin(0, 0, (1, 2, 3))[0].error
    assert bench.step(decode(6, 4))[0].error


def test_prompt_logprobs_cover_each_position_once() -> None:
    bench = Bench()
    start = SlotStart(0, 0, len(PROMPT), PROMPT, SAMPLING, LogprobSpec(start=0))
    rows = bench.step(Row(0, 0, 0, 4, PROMPT[:4], False, 0, (1, 2)), starts=(start,))
    rows += bench.step(Row(0, 0, 4, 2, PROMPT[4:], True, 2, (3,)))
    entries = [entry for row in rows for entry in row.prompt]
    assert [entry.token for entry in entries] == list(PROMPT)
    assert [entry.logprob for entry in entries] == [None, -1.0, -2.0, -3.0, -4.0, -5.0]


def test_the_pipeline_runs_one_plan_at_a_time() -> None:
    pipeline = Pipeline(Bench().executor, plan_ns=100, token_ns=10)
    first = StepPlan(0, 0, (SlotStart(0, 0, 6, PROMPT, SAMPLING),), (Row(0, 0, 0, 6, PROMPT, True, 0, (1, 2, 3)),))
    pipeline.submit(first, now_ns=0)
    pipeline.submit(StepPlan(1, 0, (), (decode(6, 4),)), now_ns=50)
    assert (pipeline.next_ns, len(pipeline)) == (160, 2)
    assert pipeline.finish().rows[0].tokens == (RIGHT[0],)
    assert pipeline.next_ns == 270
    assert pipeline.finish().rows[0].tokens == (RIGHT[1],)
    assert pipeline.next_ns is None
