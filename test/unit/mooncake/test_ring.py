"""Rings: what goes in comes out in order; what nobody could honestly have written ends the connection, and no more."""

from __future__ import annotations

import os
import random
import tracemalloc

import pytest

from moonlang.base.errors import ConfigError, PeerError
from moonlang.messaging.codec import Codec
from moonlang.mooncake.ring import (
    CONSUMED,
    HEADER_BYTES,
    INLINE_BYTES,
    PRODUCED,
    READ_BYTES,
    Geometry,
    LandingError,
    Reader,
    RingError,
    Writer,
)
from moonlang.mooncake.site import Sums

GEOMETRY = Geometry(ring_bytes=1 << 15, arena_bytes=1 << 17)
MAX_BYTES = 1 << 20
FRAMES = int(os.environ.get("MOONLANG_FUZZ_FRAMES", "20000"))


class Ring:
    """Both ends of one."""

    def __init__(self, sums: Sums | None = None) -> None:
        self.memory = memoryview(bytearray(GEOMETRY.total_bytes))
        self.writer = Writer(self.memory, GEOMETRY, sums.of if sums else None)
        self.reader = Reader(self.memory, GEOMETRY, MAX_BYTES, sums.of if sums else None)

    def put(self, message: bytes) -> bool:
        """A message that needs no more than one piece."""
        if len(message) <= INLINE_BYTES:
            return self.writer.put(message)
        return next(self.writer.put_large(message))

    def take(self, most: int = 1000) -> list[bytes]:
        found: list[bytes] = []
        self.reader.read(most, lambda frame: found.append(bytes(frame)) or True)
        return found


@pytest.mark.parametrize("sums", [None, Sums(7)])
def test_any_sizes_come_out_in_order_over_many_laps(sums: Sums | None) -> None:
    ring, draw = Ring(sums), random.Random(1)
    expected: list[bytes] = []
    taken = 0
    for _ in range(5000):
        size = draw.choice((0, 1, 7, 8, 100, 3000, INLINE_BYTES, INLINE_BYTES + 1, GEOMETRY.piece_bytes))
        message = draw.randbytes(size)
        if draw.random() < 0.6 and ring.put(message):
            expected.append(message)
        else:
            found = ring.take(draw.randint(0, 5))
            assert found == expected[: len(found)]
            del expected[: len(found)]
            taken += len(found)
    assert ring.take() == expected
    assert taken > 1000
    assert not ring.writer.unread
    assert not ring.reader.has_more()


def test_a_message_larger_than_the_arena_comes_in_parts() -> None:
    ring = Ring()
    message = random.Random(2).randbytes(5 * GEOMETRY.arena_bytes)
    found: list[bytes] = []
    for stored in ring.writer.put_large(message):
        if not stored:
            found += ring.take()
            assert not found
    assert ring.take() == [message]


def test_a_message_that_was_given_up_half_way_is_forgotten() -> None:
    ring = Ring()
    assert next(ring.writer.put_large(bytes(5 * GEOMETRY.arena_bytes)))
    assert ring.put(b"small")
    assert ring.take() == [b"small"]
    message = random.Random(3).randbytes(2 * GEOMETRY.piece_bytes)
    assert list(ring.writer.put_large(message)) == [True, True]
    assert ring.take() == [message]


def test_a_read_of_large_messages_ends_early_and_says_so() -> None:
    geometry = Geometry(arena_bytes=1 << 20)
    memory = memoryview(bytearray(geometry.total_bytes))
    writer, reader = Writer(memory, geometry), Reader(memory, geometry, MAX_BYTES)
    body = bytes(READ_BYTES // 4)
    for _ in range(6):
        assert list(writer.put_large(body)) == [True]
    assert reader.read(100, lambda frame: frame == body) == 4
    assert reader.left
    assert reader.read(100, lambda frame: frame == body) == 2
    assert not reader.left


def test_a_full_ring_takes_nothing_until_the_reader_has_read() -> None:
    ring = Ring()
    count = 0
    while ring.put(bytes(1000)):
        count += 1
    assert count == GEOMETRY.ring_bytes // 1008
    assert not ring.put(b"x" * 900)
    assert len(ring.take(1)) == 1
    assert ring.put(b"x" * 900)


def test_a_body_that_has_not_arrived_is_waited_for() -> None:
    ring = Ring(Sums(1))
    body = random.Random(4).randbytes(INLINE_BYTES * 2)
    assert ring.put(b"first")
    assert ring.put(body)
    start = HEADER_BYTES + GEOMETRY.ring_bytes
    first = ring.memory[start]
    ring.memory[start] ^= 1
    found: list[bytes] = []
    with pytest.raises(LandingError):
        ring.reader.read(10, lambda frame: found.append(bytes(frame)) or True)
    assert found == [b"first"]
    ring.memory[start] = first
    assert ring.take() == [body]


@pytest.mark.parametrize("produced", [GEOMETRY.ring_bytes + 8, 1 << 63, (1 << 64) - 8])
def test_a_writer_that_claims_too_much_is_refused(produced: int) -> None:
    ring = Ring()
    ring.writer.words[PRODUCED] = produced
    with pytest.raises(RingError):
        ring.take()


def test_a_reader_that_claims_too_much_is_refused() -> None:
    ring = Ring()
    while ring.put(bytes(1000)):
        pass
    ring.reader.words[CONSUMED] = 1 << 40
    with pytest.raises(RingError):
        ring.put(bytes(1000))


@pytest.mark.parametrize("sizes", [(1000, 1 << 20), (1 << 15, 1 << 10), (1 << 12, 1 << 20)])
def test_sizes_that_cannot_work_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        Geometry(*sizes).check()


def test_malformed_frames_are_refused_and_memory_does_not_grow() -> None:
    """MOONLANG_FUZZ_FRAMES sets the number; one in four frames is a good one that was damaged."""
    draw, codec = random.Random(5), Codec(MAX_BYTES)
    refused = delivered = 0

    def deliver(frame: memoryview | bytearray) -> bool:
        nonlocal delivered
        try:
            codec.decode(frame)
        except PeerError:
            return False
        delivered += 1
        return True

    ring = Ring()
    tracemalloc.start()
    before = 0
    for number in range(FRAMES):
        if number == FRAMES // 4:
            before = tracemalloc.get_traced_memory()[0]
        _damage(ring, draw)
        try:
            ring.reader.read(16, deliver)
        except RingError:
            refused += 1
            ring.reader = Reader(ring.memory, GEOMETRY, MAX_BYTES)
            ring.writer = Writer(ring.memory, GEOMETRY)
            ring.memory[:HEADER_BYTES] = bytes(HEADER_BYTES)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert refused > FRAMES // 4
    assert delivered == 0
    assert grown < 2 * MAX_BYTES  # the parts of a message of at most MAX_BYTES may be there


def _damage(ring: Ring, draw: random.Random) -> None:
    """Write a frame as an enemy would."""
    start = HEADER_BYTES + ring.reader.position % GEOMETRY.ring_bytes
    content = draw.randbytes(min(64, HEADER_BYTES + GEOMETRY.ring_bytes - start - 8))
    if draw.random() < 0.25 and len(content) >= 40:  # a reference with plausible numbers
        numbers = [draw.choice((0, 1, 40, 1 << 15, 1 << 17, 1 << 40, ring.reader.released)) for _ in range(5)]
        content = b"".join(number.to_bytes(8, "little") for number in numbers)
    kind, size = draw.randrange(7), draw.choice((0, 1, 40, 56, INLINE_BYTES, 1 << 31, draw.randrange(1 << 32)))
    ring.writer.words[start >> 3] = kind << 32 | size
    ring.memory[start + 8 : start + 8 + len(content)] = content
    ahead = draw.choice((8, 48, 64, 72, 1 << 14, GEOMETRY.ring_bytes, draw.randrange(1 << 16) & ~7))
    ring.writer.words[PRODUCED] = ring.reader.position + ahead
