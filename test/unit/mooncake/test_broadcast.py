"""Every worker gets every message, in order; one that takes nothing is named; memory stays bounded."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.base.errors import PeerError
from moonlang.mooncake.broadcast import Broadcast, Subscription
from moonlang.mooncake.ring import Geometry

DEADLINE_NS = 60 * NS_PER_S
WORKERS = 3
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
