"""A prefill and a decode scheduler against each other, message by message. Whole histories: the simulator."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pair_bench import EOS, MS, PATIENCE_NS, SCHEMA, Half, Pair, answer, prompt

from moonlang.core.pairing import (
    NO_TOKEN,
    Drained,
    Heard,
    Landed,
    Linked,
    Noted,
    PairMessage,
    Push,
    Pushed,
    Refuse,
    Release,
    Unreachable,
    Verify,
    Want,
)
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.core.ticket import Outcome

REPEAT_NS = 200 * MS
BUSY = ("abort", 503)


def with_fallback(**fields: Any) -> Pair:
    return Pair(decode=Half("decode", "D1", fallback=True, **fields))


def wanted(pair: Pair, length: int = 9, count: int = 4, **fields: Any) -> Pair:
    """Request "a" in room 7: the Want has been noted, the prompt is in a plan and nothing of it is computed."""
    pair.add("a", prompt(length), 7, count, **fields)
    pair.link()
    pair.carry(pair.decode)
    pair.carry(pair.prefill)
    assert (pair.prefill.out, pair.decode.out, len(pair.prefill.plans)) == ([], [], 1)
    return pair


def pushing(pair: Pair, **fields: Any) -> Pair:
    """Request "a" in room 7: all is computed, no push has been carried out."""
    wanted(pair, **fields).prefill.run_plan()
    assert pair.prefill.ops
    return pair


def served(pair: Pair, rid: str, length: int, count: int = 4) -> bool:
    return pair.decode.tokens(rid) == answer(prompt(length), count) and pair.decode.end(rid) == ("length", 0)


def kinds(half: Half) -> list[str]:
    return [type(body).__name__ for _, body in half.out]


# ---- when all goes well


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
    spare = [page for lease in prefill.scheduler.peers.leases for page in lease.spare]
    assert len(spare) == 2
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


# ---- messages that are lost, late, early, twice


def test_a_want_that_comes_before_its_request_is_kept() -> None:
    pair = Pair()
    pair.decode.add("a", prompt(9), 7)
    pair.link()
    pair.carry(pair.decode)
    assert kinds(pair.prefill) == ["Noted"]
    pair.prefill.add("a", prompt(9), 7)
    assert len(pair.prefill.plans) == 1
    pair.run()
    assert served(pair, "a", 9)


def test_a_want_is_repeated_until_it_is_noted() -> None:
    pair = Pair()
    pair.add("a", prompt(9), 7)
    pair.link()
    for _ in range(3):
        assert kinds(pair.decode) == ["Want"]
        pair.decode.out.clear()
        assert pair.decode.scheduler.next_wake_ns() == pair.decode.now_ns + REPEAT_NS
        pair.decode.wait(REPEAT_NS)
    pair.carry(pair.decode)
    pair.carry(pair.prefill)
    pair.decode.wait(REPEAT_NS)
    assert pair.decode.out == []
    pair.run()
    assert served(pair, "a", 9)


def test_everything_that_prefill_has_said_is_repeated_until_release() -> None:
    pair = pushing(Pair())
    for number in list(pair.prefill.ops):
        pair.finish(pair.prefill, number)
    pair.prefill.out.clear()
    pair.prefill.wait(REPEAT_NS)
    assert kinds(pair.prefill) == ["Pushed"] * 4 + ["Landed"]
    pair.run()
    assert served(pair, "a", 9)
    pair.prefill.wait(REPEAT_NS)
    assert pair.prefill.out == []
    pair.assert_empty()


def test_release_is_repeated_until_drained_and_answered_by_whoever_has_forgotten_the_room() -> None:
    pair = pushing(Pair())
    for number in list(pair.prefill.ops):
        pair.finish(pair.prefill, number)
    while pair.prefill.out:
        pair.carry(pair.prefill)
    for number in list(pair.decode.ops):
        pair.finish(pair.decode, number)
    assert kinds(pair.decode) == ["Release"]
    pair.carry(pair.decode)
    pair.prefill.out.clear()  # Drained is lost
    pair.decode.wait(REPEAT_NS)
    assert isinstance(pair.carry(pair.decode), Release)
    assert kinds(pair.prefill) == ["Drained"]
    pair.run()
    pair.assert_empty()


def test_every_message_may_come_twice() -> None:
    pair = Pair(Half("prefill", "P1", chunk_tokens=8))
    pair.add("a", prompt(21), 7)
    for _ in range(40):
        pair.link()
        for half in pair.halves:
            while half.out:
                half.out.insert(1, half.out[0])
                pair.carry(half)
                pair.carry(half)
            for number in list(half.ops):
                pair.finish(half, number)
            if half.plans:
                half.run_plan()
    assert served(pair, "a", 21)
    pair.assert_empty()


@pytest.mark.parametrize(
    ("body", "reply"),
    [(Release(5), Drained(5)), (Release(5, "gone"), Drained(5)), (Drained(5), None), (Noted(5), None)],
)
def test_prefill_answers_for_rooms_that_it_does_not_know(body: PairMessage, reply: PairMessage | None) -> None:
    pair = Pair()
    pair.prefill.hear(Heard(pair.decode.card, body))
    assert pair.prefill.out == ([("D1", reply)] if reply is not None else [])


@pytest.mark.parametrize(
    ("body", "answered"),
    [
        (Landed(5, 0, b"", "", 1), True),
        (Refuse(5, "full"), True),
        (Drained(5), False),
        (Pushed(5, 0, 0, 1, (), 0), False),
    ],
)
def test_decode_answers_for_rooms_that_it_does_not_know(body: PairMessage, answered: bool) -> None:
    pair = Pair()
    pair.decode.hear(Heard(pair.prefill.card, body))
    assert kinds(pair.decode) == (["Release"] if answered else [])


# ---- failures


def test_a_failed_push_ends_the_pair_on_both_sides() -> None:
    pair = pushing(Pair())
    first, *rest = pair.prefill.ops
    pair.finish(pair.prefill, first, Outcome.FAILED)
    assert pair.prefill.end("a") == BUSY
    assert pair.prefill.cancelled == rest
    assert isinstance(pair.carry(pair.prefill), Refuse)
    assert pair.decode.end("a") == BUSY
    assert pair.decode.scheduler.stats().pairs.quarantined_pages == 3
    pair.carry(pair.decode)
    for number in rest:
        assert pair.prefill.out == []  # a cancelled write may still be under way: not drained
        pair.finish(pair.prefill, number, Outcome.CANCELLED)
    assert isinstance(pair.carry(pair.prefill), Drained)
    pair.assert_empty()


def test_pages_with_a_wrong_checksum_are_never_used() -> None:
    pair = pushing(with_fallback())
    pair.prefill.finish(next(iter(pair.prefill.ops)), pair.decode, corrupt=True)
    pair.run()
    assert served(pair, "a", 9)
    assert pair.decode.scheduler.stats().pairs.total_fallbacks == 1
    pair.assert_empty()


def test_without_verification_checksums_are_not_looked_at() -> None:
    pair = pushing(Pair(decode=Half("decode", "D1", verify=False)))
    pair.talk()
    assert pair.decode.said(Verify) == []
    pair.run()
    assert served(pair, "a", 9)


def spoilt(pair: Pair, change: dict[str, Any]) -> None:
    """Carry everything up to Landed, which is changed on its way."""
    pushing(pair)
    for number in list(pair.prefill.ops):
        pair.finish(pair.prefill, number)
    *others, (instance, landed) = pair.prefill.out
    pair.prefill.out = [*others, (instance, msgspec.structs.replace(landed, **change))]
    pair.run()


@pytest.mark.parametrize(
    "change",
    [{"key": b"other"}, {"digest": "other"}, {"pushes": 3}, {"pushes": 0}, {"token": NO_TOKEN}, {"token": -2}],
    ids=str,
)
def test_decode_starts_only_on_a_complete_manifest(change: dict[str, Any]) -> None:
    pair = Pair()
    spoilt(pair, change)
    assert pair.decode.end("a") == BUSY
    assert pair.decode.tokens("a") == []
    pair.assert_empty()


@pytest.mark.parametrize(
    "change",
    [{"at": 1}, {"count": 2}, {"count": 4}, {"at": -1}, {"rank": 1}, {"spans": ()}],
    ids=str,
)
def test_a_push_that_is_not_what_was_wanted_fails_the_pair(change: dict[str, Any]) -> None:
    pair = pushing(Pair())
    for number in list(pair.prefill.ops):
        pair.finish(pair.prefill, number)
    instance, pushed = pair.prefill.out[0]
    pair.prefill.out[0] = instance, msgspec.structs.replace(pushed, **change)
    pair.run()
    assert pair.decode.end("a") == BUSY
    pair.assert_empty()


def test_two_requests_under_one_room_are_noticed() -> None:
    pair = Pair()
    pair.prefill.add("a", prompt(9), 7)
    pair.decode.add("b", prompt(9, start=50), 7)
    pair.run()
    assert pair.prefill.end("a") == pair.decode.end("b") == BUSY
    for half in pair.halves:
        half.add("c", prompt(9), 8)
        half.add("d", prompt(12), 8)
        assert half.end("d") == BUSY
    pair.run()
    assert served(pair, "c", 9)
    pair.assert_empty()


@pytest.mark.parametrize("change", [{"pages": (1,)}, {"first_page": 1}, {"pages": (1, 2, 65)}, {"pages": (0, 1, 2)}])
def test_a_want_that_cannot_be_right_is_refused(change: dict[str, Any]) -> None:
    pair = Pair()
    pair.add("a", prompt(9), 7)
    pair.link()
    instance, want = pair.decode.out.pop()
    pair.decode.out.append((instance, msgspec.structs.replace(want, **change)))
    pair.run()
    assert pair.prefill.end("a") == pair.decode.end("a") == BUSY
    pair.assert_empty()


@pytest.mark.parametrize("change", [{"fingerprint": "other weights"}, {"page_size": 8}, {"dtype": "float16"}])
def test_instances_that_differ_never_exchange_pages(change: dict[str, Any]) -> None:
    pair = with_fallback()
    pair.add("a", prompt(9), 7)
    region = pair.prefill.card.regions[0]
    other = msgspec.structs.replace(region, schema=msgspec.structs.replace(region.schema, **change))
    pair.decode.hear(Linked(7, msgspec.structs.replace(pair.prefill.card, regions=(other,))))
    pair.run()
    assert served(pair, "a", 9)
    assert pair.prefill.end("a") == BUSY
    assert pair.prefill.scheduler.stats().pairs.total_moved_bytes == 0
    pair.assert_empty()


def test_nobody_there() -> None:
    for pair, end in ((Pair(), BUSY), (with_fallback(), ("length", 0))):
        pair.decode.add("a", prompt(9), 7)
        pair.decode.hear(Unreachable(7, "Nobody there."))
        pair.run()
        assert pair.decode.end("a") == end
        pair.assert_empty()


def test_patience_has_an_end_on_both_sides() -> None:
    pair = Pair()
    pair.prefill.add("a", prompt(9), 1)
    pair.decode.add("b", prompt(9), 2)
    pair.decode.add("c", prompt(9), 3)
    pair.link()
    pair.decode.out.clear()
    assert pair.prefill.scheduler.next_wake_ns() == PATIENCE_NS
    pair.wait(PATIENCE_NS)
    assert pair.prefill.end("a") == pair.decode.end("b") == pair.decode.end("c") == BUSY
    pair.run()
    pair.assert_empty()


def test_a_want_whose_request_never_comes_is_refused_in_the_end() -> None:
    pair = with_fallback()
    pair.decode.add("a", prompt(9), 7)
    pair.talk()
    pair.prefill.wait(PATIENCE_NS)
    pair.run()
    assert served(pair, "a", 9)
    pair.assert_empty()


def test_decode_tells_prefill_how_long_it_waits() -> None:
    pair = wanted(Pair(), timeout_ms=3_000)
    pair.prefill.wait(2_999 * MS)
    assert pair.prefill.end("a") is None
    pair.prefill.wait(MS)
    assert pair.prefill.end("a") is not None


def test_a_failed_row_ends_the_pair_with_the_models_error_and_is_not_tried_again() -> None:
    pair = wanted(with_fallback())
    pair.prefill.run_plan(error="A logit is not a number.")
    pair.run()
    assert pair.prefill.end("a") == pair.decode.end("a") == ("abort", 500)
    pair.assert_empty()


# ---- aborts in every state


def states(pair: Pair) -> tuple[str, str]:
    found = []
    for half in pair.halves:
        request = half.scheduler._requests.get("a")
        found.append(request.state.value if request else "gone")
    return found[0], found[1]


def advance(pair: Pair, steps: int) -> bool:
    """The first `steps` things that happen to request "a"; False when there are not so many."""
    pair.add("a", prompt(9), 7)
    for _ in range(steps):
        if pair.decode.opened:
            pair.link()
        elif half := next((h for h in pair.halves if h.out), None):
            pair.carry(half)
        elif half := next((h for h in pair.halves if h.ops), None):
            pair.finish(half, next(iter(half.ops)))
        elif half := next((h for h in pair.halves if h.plans), None):
            half.run_plan()
        else:
            return False
    return True


def test_an_abort_on_either_side_in_every_state_frees_everything_on_both() -> None:
    seen: list[tuple[str, str]] = []
    for side in (0, 1):
        steps = 0
        while True:
            pair = Pair()
            if not advance(pair, steps):
                break
            seen.append(states(pair))
            pair.halves[side].abort("a")
            pair.run()
            for half in pair.halves:
                assert half.end("a") is not None
            pair.assert_empty()
            steps += 1
    for prefill in ("pairing", "running", "pushing", "gone"):
        assert any(state[0] == prefill for state in seen), prefill
    for decode in ("pairing", "landing", "running", "gone"):
        assert any(state[1] == decode for state in seen), decode


@pytest.mark.parametrize("fate", ["silent", "gone"])
def test_a_peer_lost_in_any_state_ends_or_restarts_the_request_at_once(fate: Any) -> None:
    steps = 0
    while True:
        pair = with_fallback()
        if not advance(pair, steps):
            break
        for half in pair.halves:
            for number in list(half.ops):
                half.finish(number, pair.other(half), Outcome.FAILED)
            half.out.clear()
        pair.decode.lose(pair.prefill, fate)
        pair.prefill.lose(pair.decode, fate)
        for half in pair.halves:
            while half.plans:
                half.run_plan()
            assert (half.end("a") or ("abort",))[0] in ("length", "abort")
        if not pair.decode.opened:  # not even found: nobody to be lost
            assert served(pair, "a", 9)
            assert pair.prefill.end("a") is not None or pair.prefill.scheduler.stats().pairs.num_pairing
        steps += 1


def test_pages_stay_in_quarantine_while_a_silent_peer_may_come_back_and_write() -> None:
    pair = pushing(with_fallback())
    pair.decode.lose(pair.prefill, "silent")
    pair.decode.run_plan()
    held = pair.decode.scheduler.stats().pairs.quarantined_pages
    assert held == 3
    pair.decode.wait(100 * PATIENCE_NS)
    assert pair.decode.scheduler.stats().pairs.quarantined_pages == held
    for number in list(pair.prefill.ops):  # it does write, and nobody is hurt
        pair.finish(pair.prefill, number)
    pair.run()
    assert served(pair, "a", 9)
    pair.assert_empty()


def test_pages_in_quarantine_are_free_when_the_peers_process_is_gone() -> None:
    pair = pushing(Pair())
    pair.decode.lose(pair.prefill, "silent")
    assert pair.decode.end("a") == BUSY
    pair.decode.lose(pair.prefill, "gone")
    assert pair.decode.scheduler.stats().pairs.quarantined_pages == 0
    assert pair.decode.scheduler.idle


def test_a_verify_under_way_holds_the_quarantine() -> None:
    pair = pushing(Pair())
    pair.finish(pair.prefill, next(iter(pair.prefill.ops)))
    pair.carry(pair.prefill)
    (verify,) = pair.decode.ops
    pair.decode.abort("a")
    pair.decode.lose(pair.prefill, "gone")
    assert pair.decode.scheduler.stats().pairs.quarantined_pages == 3
    pair.decode.finish(verify)
    assert pair.decode.scheduler.stats().pairs.quarantined_pages == 0


def test_a_successor_behind_the_same_address_is_another_peer() -> None:
    pair = pushing(Pair())
    successor = msgspec.structs.replace(pair.prefill.card, instance="P2")
    pair.decode.hear(Heard(successor, Landed(7, 0, b"", "", 1, serial=1)))
    pair.decode.hear(Heard(successor, Drained(7, serial=1)))
    assert pair.decode.end("a") is None
    pair.prefill.hear(Heard(msgspec.structs.replace(pair.decode.card, instance="D2"), Release(7, serial=1)))
    assert pair.prefill.end("a") is None
    pair.decode.out.clear()
    pair.run()
    assert served(pair, "a", 9)


def test_late_copies_of_messages_do_not_meddle_with_the_next_use_of_a_room() -> None:
    pair = Pair(decode=Half("decode", "D1", radix=False))
    late: dict[str, list[tuple[Half, PairMessage]]] = {"P1": [], "D1": []}
    for use in range(3):
        pair.add(f"r{use}", prompt(9), 7)
        for half in pair.halves:
            for sender, body in late[half.instance]:
                half.hear(Heard(sender.card, body))
        for _ in range(50):
            pair.link()
            for half in pair.halves:
                late[pair.other(half).instance] += [(half, body) for _, body in half.out]
                while half.out:
                    pair.carry(half)
                for number in list(half.ops):
                    pair.finish(half, number)
                if half.plans:
                    half.run_plan()
        assert served(pair, f"r{use}", 9)
        assert [half.scheduler.stats().pairs.total_failed for half in pair.halves] == [0, 0]
        pair.assert_empty()


def test_a_want_that_comes_after_its_release_is_refused() -> None:
    pair = Pair()
    pair.decode.add("a", prompt(9), 7)
    pair.link()
    pair.decode.abort("a")
    assert kinds(pair.decode) == ["Want", "Release"]
    pair.carry(pair.decode, 1)
    assert isinstance(pair.carry(pair.prefill), Drained)  # decode gives the pages to somebody else now
    pair.carry(pair.decode)
    assert kinds(pair.prefill) == ["Refuse"]
    pair.prefill.add("a", prompt(9), 7)
    assert pair.prefill.end("a") == BUSY
    assert not pair.prefill.ops
    pair.run()
    pair.assert_empty()


def test_decode_gives_up_before_prefill_has_the_request() -> None:
    pair = Pair()
    pair.decode.add("a", prompt(9), 7)
    pair.decode.abort("a")
    pair.link()  # found too late: prefill is told not to wait
    pair.carry(pair.decode)
    pair.prefill.add("a", prompt(9), 7)
    assert pair.prefill.end("a") == BUSY
    pair.run()
    pair.assert_empty()


def test_prefill_gives_up_before_decode_has_asked() -> None:
    for change in ("abort", "refused"):
        pair = Pair()
        if change == "abort":
            pair.prefill.add("a", prompt(9), 7)
            pair.prefill.abort("a")
        else:
            pair.prefill.add("a", prompt(300), 7)
        pair.decode.add("a", prompt(9), 7)
        pair.run()
        assert pair.decode.end("a") == ("abort", 499 if change == "abort" else 400)
        pair.assert_empty()


def test_early_wants_are_bounded() -> None:
    pair = Pair(prefill=Half("prefill", "P1", most_early=2))
    for room in range(3):
        pair.decode.add(f"r{room}", prompt(9, start=room), room)
    pair.talk()
    for room in range(3):
        pair.prefill.add(f"r{room}", prompt(9, start=room), room)
    assert pair.prefill.scheduler.stats().pairs.num_pairing == 1  # its Want, the oldest, had to make place
    assert pair.decode.end("r0") == BUSY


def test_flushing_and_checks_know_of_quarantine() -> None:
    pair = pushing(Pair())
    pair.decode.abort("a")
    assert pair.decode.scheduler.idle
    assert pair.decode.scheduler.flush_cache()
    assert not pair.prefill.scheduler.flush_cache()
    stats = pair.decode.scheduler.stats()
    assert stats.free_tokens == stats.max_total_tokens - 3 * 4


def test_priority_preemption_does_not_take_pages_that_are_being_sent() -> None:
    fields: dict[str, Any] = {"num_pages": 6, "priority": True, "preempt_gap": 1, "chunk_tokens": 8}
    pair = wanted(Pair(prefill=Half("prefill", "P1", **fields)), length=17)
    pair.prefill.run_plan()
    pair.prefill.add("urgent", prompt(17, start=50), None, 1, priority=5)
    assert pair.prefill.scheduler.stats().total_retractions == 0
    pair.run()
    assert served(pair, "a", 17)
    assert pair.prefill.tokens("urgent") == answer(prompt(17, start=50), 1)
    assert EOS not in pair.decode.tokens("a")
    pair.assert_empty()
