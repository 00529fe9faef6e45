"""Gaps and repeats are noticed; the fault wrapper produces them on purpose, the same way for the same seed."""

from __future__ import annotations

import logging

import pytest

from moonlang.core.messages import Envelope, StopHit
from moonlang.messaging.faulty import Faults, FaultyEndpoint
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.messaging.sequence import Sequence


def _envelope(seq: int, source: str = "a") -> Envelope:
    return Envelope("b", source, seq, StopHit(str(seq)))


def test_sources_are_counted_apart() -> None:
    sequence = Sequence()
    assert all(sequence.admit(_envelope(seq, source)) for seq in range(3) for source in ("a", "b"))
    assert (sequence.gaps, sequence.repeats) == (0, 0)


def test_a_repeat_is_dropped_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    sequence = Sequence()
    assert sequence.admit(_envelope(0))
    with caplog.at_level(logging.ERROR):
        assert not sequence.admit(_envelope(0))
    assert sequence.repeats == 1
    assert "came again" in caplog.text


def test_a_gap_is_logged_and_the_message_delivered(caplog: pytest.LogCaptureFixture) -> None:
    sequence = Sequence()
    with caplog.at_level(logging.ERROR):
        assert sequence.admit(_envelope(2))
    assert "0 to 1 from a are lost" in caplog.text
    assert sequence.admit(_envelope(3))
    assert sequence.gaps == 1


def test_a_number_is_used_up_only_by_a_message_that_left() -> None:
    sequence = Sequence()
    assert sequence.peek("b") == sequence.peek("b") == 0
    sequence.sent("b")
    assert (sequence.peek("b"), sequence.peek("c")) == (1, 0)


def _run(faults: Faults, count: int = 200) -> tuple[list[int], FaultyEndpoint]:
    hub = Hub(["a", "b"])
    a, b = InprocEndpoint("a", hub), FaultyEndpoint(InprocEndpoint("b", hub), faults)
    for index in range(count):
        a.send("b", StopHit(str(index)))
    seen: list[int] = []
    for _ in range(count * faults.delay_calls * 2):
        seen += [envelope.seq for envelope in b.recv(16)]
    a.close()
    b.close()
    return seen, b


def test_delays_and_duplicates_change_nothing_but_the_time() -> None:
    seen, endpoint = _run(Faults(seed=5, delay=0.3, duplicate=0.3))
    assert seen == list(range(200))
    assert endpoint.delayed > 10
    assert endpoint.duplicated > 10


def test_drops_are_gaps_and_repeat_with_the_seed() -> None:
    first, endpoint = _run(Faults(seed=5, drop=0.2))
    again, _ = _run(Faults(seed=5, drop=0.2))
    other, _ = _run(Faults(seed=6, drop=0.2))
    assert first == again != other
    assert len(first) == 200 - endpoint.dropped < 200
    assert first == sorted(set(first))
