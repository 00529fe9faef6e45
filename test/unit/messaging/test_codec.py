"""The codec refuses what is too large or not a message."""

from __future__ import annotations

import pickle

import pytest

from moonlang.base.errors import PeerError
from moonlang.core.messages import Envelope, Reply, StopHit
from moonlang.messaging.codec import Codec


def test_round_trip_of_the_smallest_message() -> None:
    codec = Codec()
    envelope = Envelope("b", "a", 7, StopHit("r"))
    assert codec.decode(codec.encode(envelope)) == envelope


def test_an_oversized_message_is_refused_on_both_sides() -> None:
    small, large = Codec(max_bytes=100), Codec()
    envelope = Envelope("b", "a", 0, Reply(0, True, "x" * 200))
    with pytest.raises(PeerError, match=r"Reply of .* over the limit of 100"):
        small.encode(envelope)
    with pytest.raises(PeerError, match="over the limit of 100"):
        small.decode(large.encode(envelope))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"hello",
        pickle.dumps(StopHit("r")),
        b"\x94\xa1b\xa1a\x00\x92\xa7Unknown\xa1r",
        b"\x94\xa1b\xa1a\xa1x\xc0",
    ],
    ids=["empty", "illegal", "text", "pickle", "unknown tag", "wrong types"],
)
def test_anything_else_is_a_peer_error(frame: bytes) -> None:
    with pytest.raises(PeerError, match="not a message"):
        Codec().decode(frame)
