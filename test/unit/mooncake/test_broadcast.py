"""Every worker gets every message, in order; one that takes nothing is named; memory stays bounded."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.base.errors import PeerError
from moonlang.mooncake import shared_memory
from moonlang.mooncake.broadcast import Broadcast, Subscription
from moonlang.mooncake.ring import CONSUMED, INLINE_BYTES, PRODUCED, Geometry, RingError

DEADLINE_NS = 60 * NS_PER_S
WORKERS = 3
FRAMES = int(os.environ.get("MOONLANG_FUZZ_PLANS", "3000"))
SMALL = Geometry(ring_bytes=1 << 15, arena_bytes=1 << 17)


@pytest.fixture
def group() -> Iterator[tuple[Broadcast, list[Subscription]]]:
    sender = Broadcast(WORKERS, SMALL)
    workers = [Subscription(sender.handles, slot, WORKERS, SMALL) for slot in range(WORKERS)]
    yield sender, workers
    for worker in workers:
        worker.close()
    sender.close()


def test_all_get_all_in_order_while_they_sleep_and_wake(group: tuple[Broadcast, list[Subscription]]) -> None:
    sender, workers = group
    draw = random.Random(1)
    messages = [draw.randbytes(draw.choice((0, 10, 500, 9000, 40_000, 300_000))) for _ in range(400)]
    found: list[list[bytes]] = [[] for _ in workers]

    def work(slot: int) -> None:
        while len(found[slot]) < len(messages):
            workers[slot].wait(DEADLINE_NS)
            found[slot] += workers[slot].recv(3)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(WORKERS)]
    for thread in threads:
        thread.start()
    for message in messages:
        sender.send(message, DEADLINE_NS)
    for thread in threads:
        thread.join(DEADLINE_NS / NS_PER_S)
    assert found == [messages] * WORKERS


def test_a_worker_that_takes_nothing_is_named_in_time(group: tuple[Broadcast, list[Subscription]]) -> None:
    sender, workers = group
    sent, refused = 0, ""
    while not refused:
        try:
            sender.send(bytes(4000), 50 * NS_PER_MS)
            sent += 1
        except PeerError as error:
            refused = error.message
        workers[0].recv()
        workers[2].recv()
    assert refused == "Workers [1] have taken nothing for 50 ms."
    assert sent < (SMALL.ring_bytes + SMALL.arena_bytes) // 4000
    assert len(workers[1].recv()) == sent
    sender.send(b"room again")
    assert [worker.recv()[-1] for worker in workers] == [b"room again"] * WORKERS


def test_a_wait_ends_with_the_time(group: tuple[Broadcast, list[Subscription]]) -> None:
    _, workers = group
    workers[0].wait(10 * NS_PER_MS)
    assert workers[0].recv() == []


def test_malformed_frames_are_refused_and_memory_does_not_grow() -> None:
    """MOONLANG_FUZZ_PLANS sets the number; one in four refers to the arena with plausible numbers."""
    draw = random.Random(6)
    geometry = replace(SMALL, readers=WORKERS)
    sender = Broadcast(WORKERS, SMALL)
    memory = shared_memory.attach(sender.handles.memory, geometry.total_bytes)
    words, slot, position, refused, largest = memory.view.cast("Q"), WORKERS - 1, 0, 0, 0
    worker = Subscription(sender.handles, slot, WORKERS, SMALL)
    for _ in range(FRAMES):
        start = geometry.start + position % geometry.ring_bytes
        content = draw.randbytes(min(64, geometry.start + geometry.ring_bytes - start - 8))
        if draw.random() < 0.25 and len(content) >= 40:
            numbers = [draw.choice((0, 1, 40, 1 << 15, 1 << 17, 1 << 40, position)) for _ in range(5)]
            content = b"".join(number.to_bytes(8, "little") for number in numbers)
        size = draw.choice((0, 1, 40, 56, INLINE_BYTES, 1 << 31, draw.randrange(1 << 32)))
        words[start >> 3] = draw.randrange(7) << 32 | size
        memory.view[start + 8 : start + 8 + len(content)] = content
        words[PRODUCED] = position + draw.choice((8, 48, 64, 72, geometry.ring_bytes, draw.randrange(1 << 16) & ~7))
        try:
            largest = max(largest, *map(len, worker.recv()), 0)
            position = words[geometry.word(CONSUMED, slot)]
        except RingError:
            refused += 1
            worker.close()
            worker = Subscription(sender.handles, slot, WORKERS, SMALL)
            memory.view[: geometry.start] = bytes(geometry.start)
            position = 0
    worker.close()
    words.release()
    memory.close()
    sender.close()
    assert refused > FRAMES // 4
    assert largest <= SMALL.arena_bytes


def test_a_worker_that_is_not_one_is_refused(group: tuple[Broadcast, list[Subscription]]) -> None:
    with pytest.raises(PeerError, match="no worker 3 of 3"):
        Subscription(group[0].handles, WORKERS, WORKERS, SMALL)
