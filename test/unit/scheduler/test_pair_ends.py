"""How a pair ends otherwise: nobody there, patience, aborts in every state, peers that are lost or replaced."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pair_bench import EOS, MS, PATIENCE_NS, Half, Pair, answer, kinds, prompt, pushing, served, wanted, with_fallback

from moonlang.core.pairing import Drained, Heard, Landed, PairMessage, Release, Unreachable
from moonlang.core.ticket import Outcome

REPEAT_NS = 200 * MS
BUSY = ("abort", 503)


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


def landed(**fields: Any) -> Pair:
    """Request "a" runs on decode's only slot, the prompt of "b" has landed behind it."""
    settings = {"max_running": 1, "extra_leases": 1, "conservativeness": 0.0} | fields
    pair = Pair(decode=Half("decode", "D1", **settings))
    for room, rid in enumerate("ab"):
        pair.add(rid, prompt(9, start=20 * room), room, count=12)
        pair.talk()
        pair.prefill.run_plan(pair.talk)
        pair.talk()
    assert pair.decode.tokens("b") == answer(prompt(9, start=20), 1)
    assert len(pair.decode.plans) == 1
    return pair


@pytest.mark.parametrize("end", ["abort", "stop", "none"])
def test_a_request_that_has_landed_and_waits_for_a_slot_may_end(end: str) -> None:
    pair = landed()
    if end == "abort":
        pair.decode.abort("b")
        assert pair.decode.end("b") == ("abort", 499)
    elif end == "stop":
        pair.decode.scheduler.stop("b")
        pair.decode.step()
    pair.run()
    assert pair.decode.tokens("a") == answer(prompt(9, start=0), 12)
    if end == "none":
        assert pair.decode.tokens("b") == answer(prompt(9, start=20), 12)
    pair.assert_empty()


def test_a_request_that_has_landed_gives_its_pages_to_one_that_runs() -> None:
    pair = landed(num_pages=7, radix=False)
    pair.run()
    for room, rid in enumerate("ab"):
        assert pair.decode.tokens(rid) == answer(prompt(9, start=20 * room), 12)
    assert pair.decode.scheduler.stats().total_retractions == 1
    pair.assert_empty()


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


def test_pages_in_quarantine_are_not_freed_by_news_of_another_pair() -> None:
    pair = pushing(Pair())
    pair.decode.abort("a")
    pair.decode.hear(Heard(pair.prefill.card, Drained(7, serial=99)))
    pair.decode.hear(Heard(msgspec.structs.replace(pair.prefill.card, instance="P2"), Drained(7, serial=1)))
    assert pair.decode.scheduler.stats().pairs.quarantined_pages == 3
    pair.decode.out.clear()
    pair.decode.hear(Heard(pair.prefill.card, Landed(7, 4, b"", "", 1, serial=1)))
    assert kinds(pair.decode) == ["Release"]  # prefill does not wait for the next repeat
    pair.run()
    pair.assert_empty()


def test_prefill_forgets_an_instance_that_is_gone() -> None:
    pair = pushing(Pair())
    pair.decode.add("early", prompt(9), 8)
    pair.link()
    pair.carry(pair.decode)
    pair.prefill.lose(pair.decode, "gone")
    for number in list(pair.prefill.ops):
        pair.finish(pair.prefill, number, Outcome.FAILED)
    pair.prefill.out.clear()
    pair.prefill.wait(REPEAT_NS)
    assert pair.prefill.out == []
    pair.prefill.add("early", prompt(9), 8)
    assert pair.prefill.scheduler.stats().pairs.num_pairing == 1  # that Want was of the instance that is gone
    pair.prefill.abort("early")
    assert pair.prefill.scheduler.idle


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
