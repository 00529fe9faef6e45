"""Messages between prefill and decode that are lost, doubled, late, unknown or wrong, and pages that are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pair_bench import MS, Half, Pair, kinds, prompt, pushing, served, with_fallback

from moonlang.core.pairing import (
    NO_TOKEN,
    Drained,
    Heard,
    Landed,
    Linked,
    Noted,
    PairMessage,
    Pushed,
    Refuse,
    Release,
    Verify,
)
from moonlang.core.ticket import Outcome

REPEAT_NS = 200 * MS
BUSY = ("abort", 503)


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
    assert kinds(pair.prefill) == ["Noted"]
    pair.prefill.out.clear()
    pair.decode.wait(REPEAT_NS)
    pair.carry(pair.decode)
    assert isinstance(pair.carry(pair.prefill), Noted)
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
