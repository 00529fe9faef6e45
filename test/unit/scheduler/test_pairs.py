"""A prefill and a decode scheduler against each other when all goes well. Whole histories: the simulator."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pair_bench import MS, SCHEMA, Half, Pair, answer, kinds, prompt, pushing, served, wanted, with_fallback

from moonlang.core.pairing import Drained, Noted, Push, Release, Want
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams

BUSY = ("abort", 503)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 41])
@pytest.mark.parametrize("chunk", [None, 8, 3])
def test_the_answer_is_that_of_one_server(length: int, chunk: int | None) -> None:
    pair = Pair(prefill=Half("prefill", "P1", chunk_tokens=chunk))
    pair.add("a", prompt(length), 7, count=6)
    pair.run()
    assert served(pair, "a", length, 6)
    assert pair.prefill.tokens("a") == answer(prompt(length), 1)
    assert pair.prefill.end("a") == ("length", 0)
    pair.assert_empty()


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 4), (4, 1), (1, 4), (4, 2), (2, 2)])
def test_unequal_tensor_parallelism_moves_every_head_to_its_rank(source: int, target: int) -> None:
    pair = Pair(Half("prefill", "P1", ranks=source, chunk_tokens=8), Half("decode", "D1", ranks=target))
    pair.add("a", prompt(30), 7, count=6)
    pair.run()
    assert served(pair, "a", 30, 6)
    pair.assert_empty()


def test_the_messages_of_a_pair_in_order() -> None:
    pair = Pair()
    pair.add("a", prompt(9), 7)
    assert pair.prefill.plans == pair.decode.plans == type(pair.prefill.plans)()
    pair.link()
    want = pair.carry(pair.decode)
    assert isinstance(want, Want)
    assert (want.prompt_len, want.first_page, len(want.pages)) == (9, 0, 3)
    assert isinstance(pair.carry(pair.prefill), Noted)
    pair.prefill.run_plan()
    for number in list(pair.prefill.ops):
        pair.finish(pair.prefill, number)
    assert kinds(pair.prefill) == ["Pushed"] * 4 + ["Landed"]
    assert pair.prefill.end("a") == ("length", 0)
    while pair.prefill.out:
        pair.carry(pair.prefill)
    assert not pair.decode.plans
    for number in list(pair.decode.ops):
        assert pair.decode.tokens("a") == []
        pair.finish(pair.decode, number)
    assert pair.decode.tokens("a") == answer(prompt(9), 1)
    row = pair.decode.plans[0].rows[0]
    assert (row.start, row.length, row.tokens, row.sample) == (9, 1, tuple(answer(prompt(9), 1)), True)
    assert isinstance(pair.carry(pair.decode), Release)
    assert isinstance(pair.carry(pair.prefill), Drained)
    pair.run()
    pair.assert_empty()


def test_layers_leave_while_the_plan_runs_when_there_are_enough_bytes() -> None:
    enough = 3 * SCHEMA.page_bytes
    for least, early in ((enough, 3), (enough + 1, 0)):
        pair = wanted(Pair(Half("prefill", "P1", push_least_bytes=least)))
        assert bool(pair.prefill.plans[0].report_layers) == bool(early)
        seen: list[int] = []
        pair.prefill.run_plan(lambda p=pair, s=seen: s.append(len(p.prefill.ops)))
        assert seen == ([1, 2, 3, 4] if early else [])
        assert len(pair.prefill.ops) == (4 if early else 1)
        pair.run()
        assert served(pair, "a", 9)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [({"push_groups": 2}, 2), ({"push_groups": 8}, 1), ({"push_span_bytes": SCHEMA.page_bytes // 4 * 2 + 1}, 3)],
)
def test_groups_of_layers_are_neither_too_many_nor_too_small(fields: dict[str, Any], layers: int) -> None:
    pair = wanted(Pair(Half("prefill", "P1", **fields)))
    assert pair.prefill.plans[0].report_layers == layers
    pair.run()
    assert served(pair, "a", 9)


def test_pages_are_pushed_as_soon_as_their_chunk_is_computed() -> None:
    pair = wanted(Pair(Half("prefill", "P1", chunk_tokens=8, push_least_bytes=1 << 30)), length=21)
    pushed = []
    while pair.prefill.plans:
        pair.prefill.run_plan()
        pushed.append([len(op.source) for op in pair.prefill.ops.values() if isinstance(op, Push)])
    assert pushed == [[2], [2, 2], [2, 2, 2]]  # the last one: a page and the page that is not full
    pair.run()
    assert served(pair, "a", 21)


def test_one_operation_moves_a_bounded_number_of_bytes() -> None:
    most = 3 * SCHEMA.page_bytes
    pair = pushing(Pair(Half("prefill", "P1", push_least_bytes=1 << 30, push_most_bytes=most)), length=29)
    assert [len(op.source) for op in pair.prefill.ops.values() if isinstance(op, Push)] == [3, 3, 2]
    pair.run()
    assert served(pair, "a", 29)


def test_what_decode_has_cached_is_not_sent_again() -> None:
    pair = Pair()
    pair.add("a", prompt(16), 1)
    pair.run()
    for rid, room, tokens, pages in (("b", 2, prompt(22), 2), ("c", 3, prompt(16), 0)):
        pair.add(rid, tokens, room)
        pair.link()
        (want,) = pair.decode.said(Want)
        assert (want.first_page, len(want.pages)) == (4, pages)
        pair.run()
        assert served(pair, rid, len(tokens))
    assert pair.decode.scheduler.stats().total_cached_tokens == 32
    pair.assert_empty()


def test_pages_that_are_on_their_way_are_not_asked_for_again() -> None:
    pair = Pair()
    for room in range(3):  # n = 3: one prompt, three samples
        pair.add(f"s{room}", prompt(45), room, sampling=SamplingParams(max_new_tokens=4, seed=room))
    pair.link()
    assert len(pair.decode.said(Want)) == 1
    pair.run()
    for seed in range(3):
        assert pair.decode.tokens(f"s{seed}") == answer(prompt(45), 4, seed)
    moved = pair.decode.scheduler.stats().pairs.total_moved_bytes
    assert moved == (12 + 1 + 1) * SCHEMA.page_bytes  # the others need the page that is not full, nothing else
    pair.assert_empty()


def test_who_waits_for_pages_of_another_asks_for_them_when_that_one_fails() -> None:
    pair = Pair()
    for room in range(2):
        pair.add(f"s{room}", prompt(45), room)
    pair.link()
    pair.decode.abort("s0")
    assert [want.room for want in pair.decode.said(Want)] == [0, 1]
    pair.run()
    assert served(pair, "s1", 45)
    pair.assert_empty()


def test_what_prefill_has_cached_is_sent_at_once() -> None:
    pair = Pair(decode=Half("decode", "D1", radix=False))
    pair.add("a", prompt(16), 1)
    pair.run()
    pair.add("b", prompt(20), 2)
    pair.link()
    pair.carry(pair.decode)
    assert [len(op.source) for op in pair.prefill.ops.values() if isinstance(op, Push)] == [4]
    pair.run()
    assert served(pair, "b", 20)
    head = pair.decode.deltas["b"][0].head
    assert head is not None
    assert head.cached_tokens == 16  # those of prefill: they are what the client has been spared
    pair.assert_empty()


def test_a_page_that_is_being_sent_stays_when_another_request_was_faster_to_cache_it() -> None:
    prefill = Half("prefill", "P1", num_pages=7, depth=2, prefix_wait_tokens=100)
    pair = Pair(prefill, Half("decode", "D1", radix=False))
    for rid, room in (("a", 1), ("b", 2)):
        pair.add(rid, prompt(9), room)
    pair.link()
    while pair.decode.out:
        pair.carry(pair.decode)
    prefill.run_plan()
    prefill.run_plan()  # both have computed the same pages; the layers of each are being sent from where they are
    first, second = prefill.scheduler.peers.leases
    assert (first.shared, second.shared) == (2, 0)
    assert not set(first.pages) & set(second.pages)
    prefill.add("c", prompt(9, start=50), None, 1)
    assert not prefill.plans  # there is no memory but that of the pushes
    pair.run()
    assert served(pair, "a", 9)
    assert served(pair, "b", 9)
    assert prefill.tokens("c") == answer(prompt(9, start=50), 1)
    pair.assert_empty()


def test_pools_of_different_size_and_more_requests_than_memory() -> None:
    pair = Pair(Half("prefill", "P1", num_pages=20), Half("decode", "D1", num_pages=9, max_running=2))
    for i in range(6):
        pair.add(f"r{i}", prompt(9 + i, start=i), i, count=5)
    pair.run()
    for i in range(6):
        assert pair.decode.tokens(f"r{i}") == answer(prompt(9 + i, start=i), 5)
    pair.assert_empty()


def test_decode_takes_no_more_pages_than_running_requests_will_leave() -> None:
    for fields, asked in (
        ({}, 3),
        ({"reserved_tokens": 12}, 1),
        ({"conservativeness": 2.0}, 1),
        ({"max_running": 1, "extra_leases": 0}, 1),
        ({"max_running": 1, "extra_leases": 1}, 2),
    ):
        pair = Pair(decode=Half("decode", "D1", **({"num_pages": 9, "conservativeness": 0.0} | fields)))
        for i in range(3):
            pair.add(f"r{i}", prompt(7, start=20 * i), i, count=14)
        pair.link()
        assert len(pair.decode.said(Want)) == asked, fields
        assert pair.decode.scheduler.stats().pairs.num_pairing == 3 - asked
        pair.run()
        for i in range(3):
            assert pair.decode.tokens(f"r{i}") == answer(prompt(7, start=20 * i), 14)
        pair.assert_empty()


def test_requests_that_start_again_by_themselves_go_before_new_ones() -> None:
    pair = with_fallback(max_running=1, extra_leases=0)
    pair.decode.add("runs", prompt(9), None, 3)
    pair.decode.add("fails", prompt(9, start=20), 1)
    pair.unreachable()
    pair.add("new", prompt(9, start=40), 2)
    pair.link()
    while not pair.decode.said(Want):
        pair.decode.run_plan()
    assert pair.decode.end("fails") == ("length", 0)
    pair.run()
    assert pair.decode.tokens("new") == answer(prompt(9, start=40), 4)


def test_requests_that_wait_for_their_other_half_count_as_waiting() -> None:
    for half in (Half("prefill", "P1", max_queued=1), Half("decode", "D1", max_queued=1)):
        half.add("a", prompt(9), 1)
        half.add("b", prompt(9), 2)
        assert (half.end("a"), half.end("b")) == (None, BUSY)


def test_a_retracted_decode_request_computes_its_prompt_again_by_itself() -> None:
    pair = Pair(decode=Half("decode", "D1", num_pages=12, conservativeness=0.0, radix=False))
    for i in range(3):
        pair.add(f"r{i}", prompt(9, start=20 * i), i, count=20)
    pair.run()
    for i in range(3):
        assert pair.decode.tokens(f"r{i}") == answer(prompt(9, start=20 * i), 20)
    stats = pair.decode.scheduler.stats()
    assert stats.total_retractions > 0
    assert stats.pairs.total_paired == 3
    pair.assert_empty()


def test_seeds_logprobs_and_stop_tokens_go_on_where_prefill_has_ended() -> None:
    pair = Pair()
    right = answer(prompt(9), 6, seed=5)
    sampling = SamplingParams(max_new_tokens=6, seed=5, stop_token_ids=(right[3],))
    pair.add("a", prompt(9), 1, sampling=sampling, logprob=LogprobSpec(start=0))
    pair.add("b", prompt(9), 2, sampling=msgspec.structs.replace(sampling, stop_token_ids=(right[0],)))
    pair.talk()
    while pair.prefill.plans:
        pair.prefill.run_plan(pair.talk)
    pair.talk()
    assert [s.logprob.start for s in pair.decode.plans[0].starts if s.logprob] == [-1]  # prefill has told the prompt's
    pair.run()
    assert pair.decode.tokens("a") == right[:4]
    assert [entry.token for delta in pair.decode.deltas["a"] for entry in delta.output] == right[:4]
    assert [entry.logprob for delta in pair.decode.deltas["a"] for entry in delta.output] == [-10, -11, -12, -13]
    assert pair.decode.tokens("b") == right[:1]  # ended by the first token: nothing was decoded
    assert (pair.decode.end("a"), pair.decode.end("b")) == (("stop", 0), ("stop", 0))
    pair.assert_empty()


def test_both_halves_compile_the_grammar_and_a_want_waits_for_it() -> None:
    pair = Pair()
    spec = GrammarSpec("regex", "a+")
    pair.add("a", prompt(9), 7, sampling=SamplingParams(max_new_tokens=3, grammar=spec))
    assert not pair.decode.opened
    pair.decode.compiled(spec)
    pair.talk()
    assert pair.prefill.scheduler.stats().num_grammar == 1
    pair.prefill.compiled(spec)
    pair.run()
    assert served(pair, "a", 9, 3)
    pair.assert_empty()


def test_no_new_tokens_sends_the_prompt_and_no_token() -> None:
    pair = Pair()
    pair.add("a", prompt(9), 7, count=0)
    pair.run()
    assert pair.decode.tokens("a") == pair.prefill.tokens("a") == []
    assert pair.decode.end("a") == ("length", 0)
    pair.assert_empty()


def test_a_request_without_a_room_is_served_alone() -> None:
    pair = Pair()
    for half in pair.halves:
        half.add("warm", prompt(9), None, 3)
    pair.run()
    assert pair.prefill.tokens("warm") == pair.decode.tokens("warm") == answer(prompt(9), 3)
    pair.assert_empty()


def test_what_a_pair_does_is_counted() -> None:
    pair = Pair()
    pair.add("a", prompt(9), 7)
    pair.wait(5 * MS)
    pair.link()
    pair.carry(pair.decode)
    pair.prefill.run_plan()
    pair.wait(3 * MS)
    assert pair.prefill.scheduler.stats().pairs.num_transfers == 4
    pair.run()
    for half in pair.halves:
        stats = half.scheduler.stats().pairs
        assert (stats.total_paired, stats.total_moved, stats.total_moved_bytes) == (1, 1, 3 * SCHEMA.page_bytes)
        assert (stats.total_pairing_ns, stats.total_moving_ns, stats.total_failed) == (5 * MS, 3 * MS, 0)
