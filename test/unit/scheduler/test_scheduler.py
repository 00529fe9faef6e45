"""The scheduler by example: plans are plain values, so each rule is a few lines. Whole histories: the simulator."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from moonlang.base.errors import BugError
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.plan import RowResult, StepPlan, StepResult
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig

EOS = 99


class Bench:
    """A scheduler with a model that always samples `token`."""

    def __init__(self, **config: Any) -> None:
        defaults: dict[str, Any] = {"num_pages": 65, "page_size": 4, "context_length": 200, "eos_token_ids": (EOS,)}
        self.scheduler = Scheduler(SchedulerConfig(**(defaults | {"depth": 1} | config)))
        self.in_flight: deque[StepPlan] = deque()
        self.now_ns = 0
        self.heard: dict[str, list[TokenDelta]] = {}

    def add(self, rid: str, prompt: list[int], max_new_tokens: int | None = 4, **fields: Any) -> list[TokenDelta]:
        sampling = fields.pop("sampling", None) or SamplingParams(max_new_tokens=max_new_tokens)
        fields.setdefault("stream", True)
        return self.hear(self.scheduler.add(Generate(rid, prompt, sampling, **fields), self.now_ns))

    def hear(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        for delta in deltas:
            self.heard.setdefault(delta.rid, []).append(delta)
        return deltas

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now_ns)
        if plan is not None:
            self.in_flight.append(plan)
        self.scheduler.check()
        return plan

    def must_plan(self) -> StepPlan:
        plan = self.plan()
        assert plan is not None
        return plan

    def commit(self, token: int = 7, **outcome: Any) -> list[TokenDelta]:
        plan = self.in_flight.popleft()
        rows = tuple(RowResult(r.slot, r.epoch, (token,) if r.sample else (), **outcome) for r in plan.rows)
        deltas = self.hear(self.scheduler.commit(StepResult(plan.plan_id, rows), self.now_ns))
        self.scheduler.check()
        return deltas

    def run(self, token: int = 7) -> None:
        """Until nothing is left to do."""
        for _ in range(2_000):
            while self.plan() is not None:
                pass
            if not self.in_flight:
                break
            self.commit(token)
        assert self.scheduler.idle

    def tokens(self, rid: str) -> list[int]:
        return [token for delta in self.heard[rid] for token in delta.tokens]

    def end(self, rid: str) -> tuple[str, object]:
        finishes = [delta.finish for delta in self.heard[rid] if delta.finish is not None]
        assert len(finishes) == 1
        return finishes[0].kind, finishes[0].matched if finishes[0].kind == "stop" else finishes[0].status


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def test_prefill_then_decode_until_length() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 6), max_new_tokens=3)
    first = bench.must_plan()
    assert [(r.start, r.length, r.tokens, r.sample) for r in first.rows] == [(0, 6, (0, 1, 2, 3, 4, 5), True)]
    assert len(first.rows[0].pages) == 2
    assert first.starts[0].tokens == (0, 1, 2, 3, 4, 5)
    bench.commit()
    second = bench.must_plan()
    assert [(r.start, r.length, r.tokens, r.pages) for r in second.rows] == [(6, 1, (), ())]
    bench.commit()
    bench.must_plan()
    assert bench.commit()[0].finish is not None
    assert bench.tokens("a") == [7, 7, 7]
    assert bench.end("a") == ("length", 0)
    assert bench.scheduler.idle


def test_eos_ends_unless_ignored_and_stop_token_ids_count_as_well() -> None:
    for sampling, kind in (
        (SamplingParams(max_new_tokens=3), "stop"),
        (SamplingParams(max_new_tokens=3, ignore_eos=True), "length"),
        (SamplingParams(max_new_tokens=3, ignore_eos=True, stop_token_ids=(EOS,)), "stop"),
        (SamplingParams(max_new_tokens=3, min_new_tokens=2), "stop"),
    ):
        bench = Bench()
        bench.add("a", prompt(0, 5), sampling=sampling)
        bench.run(EOS)
        assert bench.end("a")[0] == kind
        assert len(bench.tokens("a")) == (1 if kind == "stop" else 3) + sampling.min_new_tokens


def test_a_prompt_is_cut_to_whole_pages_within_the_budget() -> None:
    bench = Bench(chunk_tokens=10)
    bench.add("a", prompt(0, 23))
    lengths = []
    for _ in range(3):
        lengths.append([(r.length, r.sample) for r in bench.must_plan().rows])
        bench.commit()
    assert lengths == [[(8, False)], [(8, False)], [(7, True)]]


def test_without_chunking_a_prompt_goes_in_whole_or_waits() -> None:
    bench = Bench(chunk_tokens=None, max_prefill_tokens=16)
    bench.add("long", prompt(0, 40))
    bench.add("short", prompt(100, 5))
    assert [r.length for r in bench.must_plan().rows] == [40]
    bench.commit()
    assert [r.length for r in bench.must_plan().rows] == [1, 5]


def test_decode_rows_come_first_and_share_the_plan_with_prefill() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 4))
    bench.must_plan()
    bench.commit()
    bench.add("b", prompt(50, 9))
    assert [r.length for r in bench.must_plan().rows] == [1, 9]


def test_a_second_request_takes_the_prefix_from_the_cache_but_never_the_last_token() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 16), max_new_tokens=1)
    bench.run()
    bench.add("b", prompt(0, 16), max_new_tokens=1)
    row = bench.must_plan().rows[0]
    assert (row.start, row.length, len(row.pages)) == (12, 4, 4)
    bench.commit()
    head = bench.heard["b"][0].head
    assert head is not None
    assert head.cached_tokens == 12


def test_the_output_is_cached_too_for_the_next_turn() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 6), max_new_tokens=7)
    bench.run()
    bench.add("b", [*prompt(0, 6), *[7] * 7, 1, 2], max_new_tokens=1)
    assert bench.must_plan().rows[0].start == 12  # the last token of the answer has no KV


def test_extra_keys_never_share() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 16), max_new_tokens=1, extra_key="tenant-1")
    bench.run()
    bench.add("b", prompt(0, 16), max_new_tokens=1, extra_key="tenant-2")
    assert bench.must_plan().rows[0].start == 0


def test_requests_with_a_common_prefix_wait_for_the_first_to_compute_it() -> None:
    bench = Bench(prefix_wait_tokens=8)
    shared = prompt(0, 20)
    for i in range(3):
        bench.add(f"r{i}", [*shared, 50 + i], max_new_tokens=1)
    assert len(bench.must_plan().rows) == 1
    bench.commit()
    rows = bench.must_plan().rows
    assert [(r.start, r.length) for r in rows] == [(20, 1), (20, 1)]


def test_prompt_logprobs_are_computed_not_taken_from_the_cache() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 16), max_new_tokens=1)
    bench.run()
    bench.add("b", prompt(0, 16), max_new_tokens=1, logprob=LogprobSpec(start=0))
    assert bench.must_plan().rows[0].start == 0
    bench.commit()
    bench.add("c", prompt(0, 16), max_new_tokens=1, logprob=LogprobSpec(start=9))
    assert bench.must_plan().rows[0].start == 8  # the entry of position 9 needs the logits of position 8


def test_no_new_tokens_computes_the_prompt_and_samples_nothing() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 6), max_new_tokens=0)
    assert [r.sample for r in bench.must_plan().rows] == [False]
    bench.commit()
    assert bench.tokens("a") == []
    assert bench.end("a") == ("length", 0)


def test_a_full_pool_retracts_and_the_output_is_kept() -> None:
    bench = Bench(num_pages=13, page_size=4, conservativeness=0.0)
    for i in range(3):
        bench.add(f"r{i}", prompt(100 * i, 12), max_new_tokens=12)
    bench.run()
    assert bench.scheduler.stats().total_retractions > 0
    assert all(len(bench.tokens(f"r{i}")) == 12 for i in range(3))
    assert max(delta.retractions for deltas in bench.heard.values() for delta in deltas) > 0


def test_one_request_may_fill_the_whole_pool() -> None:
    bench = Bench(num_pages=6, page_size=4)
    bench.add("a", prompt(0, 3), max_new_tokens=None)
    bench.run()
    assert len(bench.tokens("a")) == 5 * 4 - 3
    assert bench.end("a") == ("length", 0)


def test_overlap_plans_before_the_token_is_known_and_drops_the_void_row() -> None:
    bench = Bench(depth=2)
    bench.add("a", prompt(0, 4), max_new_tokens=10)
    bench.must_plan()
    ahead = bench.must_plan()
    assert [(r.start, r.length, r.tokens) for r in ahead.rows] == [(4, 1, ())]
    assert bench.plan() is None, "only two plans may be in flight"
    assert bench.commit(EOS)[0].finish is not None
    assert bench.commit(5) == [], "the row that was planned ahead is void"
    assert bench.tokens("a") == [EOS]
    assert bench.scheduler.idle


def test_overlap_stops_at_the_length_without_a_void_row() -> None:
    bench = Bench(depth=2)
    bench.add("a", prompt(0, 4), max_new_tokens=1)
    bench.must_plan()
    assert bench.plan() is None


def test_pages_of_an_aborted_request_are_not_given_away_while_its_plan_runs() -> None:
    bench = Bench(num_pages=4, page_size=4, context_length=12, depth=2)
    bench.add("a", prompt(0, 7), max_new_tokens=5)
    taken = set(bench.must_plan().rows[0].pages)
    bench.hear(bench.scheduler.abort("a"))
    bench.add("b", prompt(50, 9), max_new_tokens=1)
    assert bench.plan() is None, "the only free page is too little"
    bench.commit()
    assert taken <= set(bench.must_plan().rows[0].pages)


@pytest.mark.parametrize("exact", [True, False])
def test_abort_in_every_state_gives_all_pages_back(exact: bool) -> None:
    grammar = SamplingParams(grammar=GrammarSpec("regex", "a+"))
    bench = Bench(max_running=1, depth=2)
    bench.add("run", prompt(0, 30), max_new_tokens=20)
    bench.add("wait", prompt(40, 30), max_new_tokens=20)
    bench.add("grammar", prompt(80, 30), sampling=grammar)
    bench.must_plan()
    for rid in ("grammar", "wait", "run"):
        deltas = bench.hear(bench.scheduler.abort(rid, exact=exact))
        assert [d.finish.kind for d in deltas if d.finish] == ["abort"]
    bench.commit()
    assert bench.scheduler.idle
    bench.scheduler.check()
    assert bench.scheduler.stats().used_tokens == 0


def test_abort_takes_prefixes_unless_exact() -> None:
    bench = Bench()
    for rid in ("a", "a1", "b"):
        bench.add(rid, prompt(0, 5))
    assert [d.rid for d in bench.scheduler.abort("a", exact=True)] == ["a"]
    assert [d.rid for d in bench.scheduler.abort("a")] == ["a1"]
    assert [d.rid for d in bench.scheduler.abort("", every=True)] == ["b"]


def test_refusals_say_why() -> None:
    bench = Bench(max_queued=1, context_length=20)
    assert bench.add("empty", [])[0].finish.status == 400  # type: ignore[union-attr]
    too_long = bench.add("long", prompt(0, 20))[0].finish
    assert too_long is not None
    assert too_long.message.startswith("Input length (20 tokens) exceeds the maximum allowed")
    assert bench.add("a", prompt(0, 5)) == []
    twin = bench.add("a", prompt(0, 5))[0].finish
    assert twin is not None
    assert twin.status == 400
    full = bench.add("b", prompt(0, 5))[0].finish
    assert full is not None
    assert (full.status, full.message) == (503, "The request queue is full.")


def test_deadlines_end_waiting_and_running_requests() -> None:
    bench = Bench(max_running=1)
    bench.add("run", prompt(0, 5), timeout_ms=5)
    bench.add("wait", prompt(9, 5), timeout_ms=3)
    bench.must_plan()
    assert bench.scheduler.next_wake_ns() == 3_000_000
    assert [d.rid for d in bench.hear(bench.scheduler.expire(3_000_000))] == ["wait"]
    assert [d.rid for d in bench.hear(bench.scheduler.expire(5_000_000))] == ["run"]
    assert bench.end("run") == ("abort", 504)
    bench.commit()
    assert bench.scheduler.idle
    assert bench.scheduler.next_wake_ns() is None


def test_priority_orders_the_queue_and_preempts_beyond_the_gap() -> None:
    bench = Bench(max_running=1, priority=True, preempt_gap=10)
    bench.add("low", prompt(0, 5), priority=0, max_new_tokens=3)
    bench.must_plan()
    bench.commit()
    bench.add("mid", prompt(20, 5), priority=5, max_new_tokens=3)
    bench.add("high", prompt(40, 5), priority=10, max_new_tokens=3)
    plan = bench.must_plan()
    assert [s.tokens[0] for s in plan.starts] == [40], "ten more than the one that runs"
    bench.commit()
    bench.run()
    ends = [rid for rid, deltas in bench.heard.items() if deltas[-1].finish]
    assert sorted(ends) == ["high", "low", "mid"]
    assert len(bench.tokens("low")) == 3


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("fcfs", "abc"), ("lof", "cba"), ("lpm", "bca"), ("dfs-weight", "bca"), ("priority", "abc")],
)
def test_policies_order_admission(policy: str, expected: str) -> None:
    bench = Bench(policy=policy, max_running=1, prefix_wait_tokens=1_000)
    bench.add("warm", prompt(50, 16), max_new_tokens=1)
    bench.run()
    for rid, tokens, new in (("a", prompt(0, 17), 1), ("b", prompt(50, 17), 2), ("c", [*prompt(50, 8), 1], 3)):
        bench.add(rid, tokens, max_new_tokens=new)
    order = []
    while not bench.scheduler.idle:
        plan = bench.plan()
        order += [
            next(
                r
                for r in "abc"
                if len(s.tokens) == {"a": 17, "b": 17, "c": 9}[r] and s.tokens[0] == (0 if r == "a" else 50)
            )
            for s in (plan.starts if plan else ())
        ]
        bench.commit()
    assert "".join(order) == expected


def test_random_policy_depends_on_the_seed_only() -> None:
    def starts(seed: int) -> list[int]:
        bench = Bench(policy="random", max_running=1, seed=seed)
        for i in range(8):
            bench.add(f"r{i}", [i, i, i], max_new_tokens=1)
        seen = []
        while not bench.scheduler.idle:
            seen += [s.tokens[0] for s in bench.must_plan().starts]
            bench.commit()
        return seen

    assert starts(1) == starts(1) != starts(2)
    assert sorted(starts(2)) == list(range(8))


def test_grammars_are_compiled_once_and_hold_only_their_own_requests() -> None:
    spec = GrammarSpec("regex", "[ab]+")
    bench = Bench()
    for rid in ("a", "b"):
        bench.add(rid, prompt(0, 5), sampling=SamplingParams(max_new_tokens=2, grammar=spec))
    bench.add("plain", prompt(9, 5))
    assert bench.scheduler.grammars_wanted() == [spec]
    assert len(bench.must_plan().starts) == 1
    bench.commit()
    assert bench.scheduler.grammar_ready(spec, "", bench.now_ns) == []
    assert len(bench.must_plan().starts) == 2
    bench.commit()
    bench.run()
    bench.add("c", prompt(0, 5), sampling=SamplingParams(max_new_tokens=2, grammar=spec))
    assert bench.scheduler.grammars_wanted() == [spec], "what is compiled is the engine's to remember"
    bench.scheduler.abort("c")
    assert bench.scheduler.grammar_ready(spec, "", bench.now_ns) == []
    bad = GrammarSpec("regex", "(")
    bench.add("bad", prompt(0, 5), sampling=SamplingParams(grammar=bad))
    assert bench.scheduler.grammars_wanted() == [bad]
    assert [d.finish.status for d in bench.scheduler.grammar_ready(bad, "Unbalanced.", bench.now_ns) if d.finish] == [
        400
    ]
    assert bench.scheduler.idle


@pytest.mark.parametrize(("token", "matched"), [(7, None), (EOS, EOS)])
def test_a_complete_grammar_ends_with_its_last_token_in_the_text(token: int, matched: int | None) -> None:
    bench = Bench()
    bench.add("a", prompt(0, 3))
    bench.must_plan()
    bench.commit(token, ended=True)
    assert bench.end("a") == ("stop", matched)
    assert bench.tokens("a") == [token]


def test_a_failed_row_ends_its_request_only() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 5))
    bench.add("b", prompt(9, 5))
    plan = bench.must_plan()
    bench.in_flight.clear()
    rows = (
        RowResult(plan.rows[0].slot, plan.rows[0].epoch, error="nan"),
        RowResult(plan.rows[1].slot, plan.rows[1].epoch, (7,)),
    )
    deltas = bench.hear(bench.scheduler.commit(StepResult(plan.plan_id, rows), 0))
    assert bench.end("a") == ("abort", 500)
    assert [d.tokens for d in deltas] == [(), (7,)]
    bench.run()


def test_a_request_nobody_watches_is_told_once_at_its_end() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 5), max_new_tokens=6, stream=False)
    bench.run()
    assert len(bench.heard["a"]) == 1
    assert bench.tokens("a") == [7] * 6
    searching = SamplingParams(max_new_tokens=6, stop=("x",))
    bench.add("b", prompt(0, 5), sampling=searching, stream=False)
    bench.run()
    assert len(bench.heard["b"]) == 6


def test_stop_ends_without_a_word() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 5), max_new_tokens=50)
    bench.must_plan()
    bench.commit()
    bench.scheduler.stop("a")
    assert bench.scheduler.idle
    assert len(bench.heard["a"]) == 1


def test_flush_forgets_prefixes_but_not_while_something_runs() -> None:
    bench = Bench()
    bench.add("a", prompt(0, 16))
    bench.must_plan()
    assert not bench.scheduler.flush_cache()
    bench.commit()
    bench.run()
    assert bench.scheduler.stats().cached_tokens > 0
    assert bench.scheduler.flush_cache()
    assert bench.scheduler.stats().cached_tokens == 0
    bench.add("b", prompt(0, 16))
    assert bench.must_plan().rows[0].start == 0


def test_results_out_of_order_are_a_bug() -> None:
    bench = Bench(depth=2)
    bench.add("a", prompt(0, 5))
    first = bench.must_plan()
    bench.must_plan()
    with pytest.raises(BugError):
        bench.scheduler.commit(StepResult(first.plan_id + 1, ()), 0)


def test_without_a_prefix_cache_everything_is_computed_and_given_back() -> None:
    bench = Bench(radix=False)
    for _ in range(2):
        bench.add("a", prompt(0, 16))
        assert bench.must_plan().rows[0].start == 0
        bench.commit()
        bench.run()
    assert bench.scheduler.stats().free_tokens == bench.scheduler.stats().max_total_tokens


@pytest.mark.parametrize("depth", [1, 2])
def test_memory_that_is_lost(depth: int) -> None:
    """Whoever runs is computed again with its output, from the first token; plans made before are void."""
    bench = Bench(depth=depth, num_pages=17)
    bench.add("a", list(range(10, 22)), max_new_tokens=8)
    bench.add("b", list(range(30, 37)), max_new_tokens=8)
    for _ in range(3):
        bench.must_plan()
        bench.commit()
    while bench.plan() is not None:
        pass
    assert len(bench.in_flight) == depth
    for _ in range(depth):
        plan = bench.in_flight.popleft()
        assert plan.era == 0
        assert not bench.scheduler.commit(StepResult(plan.plan_id, (), lost=True), bench.now_ns)
        bench.scheduler.check()
    plan = bench.must_plan()
    assert plan.era == 1
    assert [(start.prompt_len, len(start.tokens)) for start in plan.starts] == [(12, 15), (7, 10)]
    assert [row.start for row in plan.rows] == [0, 0]
    bench.commit()
    bench.run()
    for rid in "ab":
        assert [token for delta in bench.heard[rid] for token in delta.tokens] == [7] * 8
    assert bench.scheduler.idle
    assert bench.scheduler.stats().total_retractions == 2


def test_lanes_share_the_decode_rows_and_never_wait_for_each_other() -> None:
    """Stages of a pipeline: each plan in flight is of other requests, and brings the tokens it needs."""
    bench = Bench(depth=2, lanes=2)
    for rid in "abcde":
        bench.add(rid, prompt(ord(rid), 5), max_new_tokens=20)
    bench.must_plan()
    assert bench.plan() is None, "all tokens to come are still to be sampled"
    bench.commit(token=3)
    seen: list[list[int]] = []
    for _ in range(5):
        while (plan := bench.plan()) is not None:
            assert all(row.tokens == (3,) for row in plan.rows)
            seen.append([row.slot for row in plan.rows])
        assert len(bench.in_flight) == 2
        assert not set(seen[-1]) & set(seen[-2])
        bench.commit(token=3)
    assert {len(rows) for rows in seen} == {2, 3}
    counts = [sum(slot in rows for rows in seen) for slot in set().union(*seen)]
    assert len(counts) == 5
    assert max(counts) - min(counts) <= 1


def test_the_chunks_of_a_prompt_follow_each_other_through_the_lanes() -> None:
    bench = Bench(depth=3, lanes=3, chunk_tokens=8)
    bench.add("a", prompt(0, 20), max_new_tokens=2)
    assert [bench.must_plan().rows[0].start for _ in range(3)] == [0, 8, 16]
    bench.run()
    assert bench.end("a") == ("length", 0)


def test_rows_of_a_lane_are_bounded() -> None:
    bench = Bench(depth=2, lanes=2, lane_rows=2)
    for rid in "abcdefg":
        bench.add(rid, prompt(ord(rid), 5), max_new_tokens=3)
    for _ in range(20):
        while (plan := bench.plan()) is not None:
            assert len(plan.rows) <= 2
        if bench.in_flight:
            bench.commit()
    assert bench.scheduler.idle
