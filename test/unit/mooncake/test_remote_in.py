"""The receiving end between hosts believes no bell: what fits nothing ends the lane, and nothing is delivered."""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from moonlang.core.messages import Envelope, StopHit
from moonlang.messaging.codec import Codec
from moonlang.mooncake import greeting
from moonlang.mooncake.greeting import Hello, Talk
from moonlang.mooncake.lane import Identity
from moonlang.mooncake.remote_in import RemoteIn
from moonlang.mooncake.ring import Geometry, RingError, Writer
from moonlang.mooncake.site import BELL, CARRIED_BYTES, HEADER_BYTES, Site, sums_of

SMALL = Geometry(ring_bytes=1 << 15, arena_bytes=1 << 17)
STREAMS = int(os.environ.get("MOONLANG_FUZZ_BELLS", "300"))
IDENTITY = Identity("b", b"i" * 16, "token", SMALL)
HELLO = Hello(greeting.VERSION, "a", "b", b"a" * 16, b"s" * 16, b"n" * 32, SMALL.ring_bytes, SMALL.arena_bytes)


class Memories:
    """An engine that registers anything."""

    def register(self, address: int, size: int) -> None: ...

    def session(self, tag_address: int) -> str:
        return f"host:1@{tag_address:x}"


@pytest.fixture
def site() -> Site:
    return Site(Memories())  # pyright: ignore[reportArgumentType]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    sender, receiver = socket.socketpair()
    receiver.setblocking(False)
    with sender, receiver:
        yield sender, receiver


def lane(site: Site, sock: socket.socket) -> RemoteIn:
    return RemoteIn(IDENTITY, HELLO, Codec(), Talk(sock), site, select.epoll())


def batch(bodies: list[str]) -> tuple[int, bytes]:
    """The position behind these messages, and what lies before it in the ring."""
    memory = memoryview(bytearray(SMALL.total_bytes))
    writer = Writer(memory, SMALL)
    for number, rid in enumerate(bodies):
        assert writer.put(Codec().encode(Envelope("b", "a", number, StopHit(rid))))
    return writer.position, bytes(memory[HEADER_BYTES : HEADER_BYTES + writer.position])


def bell(end: int, content: bytes) -> bytes:
    checksum = sums_of(IDENTITY.token, HELLO.stream).of(memoryview(content))
    return BELL.pack(end, checksum, len(content)) + content


def test_a_batch_that_travels_with_its_bell_is_delivered_once_it_is_whole(
    site: Site, ends: tuple[socket.socket, socket.socket]
) -> None:
    sender, receiver = ends
    into, found = lane(site, receiver), []
    said = bell(*batch(["1", "2"]))
    for byte in said[:-1]:
        sender.send(bytes([byte]))
        into.read(10, found)
        assert found == []
    sender.send(said[-1:])
    into.read(10, found)
    assert [envelope.body for envelope in found] == [StopHit("1"), StopHit("2")]


@pytest.mark.parametrize(
    ("end", "content"),
    [(1 << 40, b"x" * 8), (24, b"x" * 16), (16, b"x" * 24), (24, b"x" * (CARRIED_BYTES + 1))],
)
def test_a_bell_that_cannot_be_ends_the_lane(
    site: Site, ends: tuple[socket.socket, socket.socket], end: int, content: bytes
) -> None:
    sender, receiver = ends
    into = lane(site, receiver)
    sender.send(bell(end, content))
    with pytest.raises(RingError):
        into.read(10, [])


def test_bells_of_noise_deliver_nothing(site: Site, ends: tuple[socket.socket, socket.socket]) -> None:
    """MOONLANG_FUZZ_BELLS sets the number of streams."""
    sender, receiver = ends
    draw = random.Random(5)
    (first, _), (end, content) = batch(["1"]), batch(["1", "2"])
    good, next_good = bell(first, content[:first]), bell(end, content[first:])
    for _ in range(STREAMS):
        into, found = lane(site, receiver), []
        bad = bytearray(next_good)
        bad[draw.randrange(len(bad))] ^= draw.randrange(1, 256)
        sender.send(good + bad if draw.random() < 0.5 else good + draw.randbytes(draw.randrange(200)))
        with suppress(RingError):
            into.read(10, found)
        assert [envelope.seq for envelope in found] in ([], [0])
        assert all(envelope.body == StopHit("1") for envelope in found)
        into.close()
        with suppress(BlockingIOError):
            while receiver.recv(4096):
                pass
