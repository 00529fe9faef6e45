"""A subscriber with no code of ours gets what SGLang documents, and can ask for what it missed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from moonlang.base.errors import ConfigError
from moonlang.config.kv_events import KvEventsConfig
from moonlang.core.kv_events import BlockRemoved, BlockStored
from moonlang.observability.kv_events import KvEventPublisher

WAIT_MS = 60_000
EVENTS = [BlockStored([7, -8], None, [1, 2, 3, 4], 2, medium="GPU"), BlockRemoved([7], medium="GPU")]


@contextmanager
def listener(kind: int, address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as found:
        found.set(zmq.RCVTIMEO, WAIT_MS)
        found.set(zmq.LINGER, 0)
        if kind == zmq.SUB:
            found.subscribe(b"kv")
        found.connect(address)
        yield found


def first_heard(publisher: KvEventPublisher, subscriber: zmq.Socket[bytes]) -> list[bytes]:
    """A subscriber that has just come misses what is published before it is known."""
    for _ in range(WAIT_MS // 20):
        publisher.publish(EVENTS)
        if subscriber.poll(20):
            return subscriber.recv_multipart()
    raise AssertionError("nothing was heard")


def test_what_a_subscriber_hears(tmp_path: Path) -> None:
    config = KvEventsConfig(publisher="zmq", endpoint=f"ipc://{tmp_path}/events", topic="kv", dp_rank=3)
    publisher = KvEventPublisher(config)
    with listener(zmq.SUB, config.endpoint) as subscriber:
        topic, number, payload = first_heard(publisher, subscriber)
        assert topic == b"kv"
        stamp, events, rank = msgspec.msgpack.decode(payload)
        assert stamp > 1.7e9
        assert rank == 3
        assert events == [
            {
                "type": "BlockStored",
                "block_hashes": [7, -8],
                "parent_block_hash": None,
                "token_ids": [1, 2, 3, 4],
                "block_size": 2,
                "medium": "GPU",
            },
            {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"},
        ]
        publisher.publish([])
        while (following := int.from_bytes(subscriber.recv_multipart()[1], "big")) < int.from_bytes(number, "big") + 1:
            pass
        assert following == int.from_bytes(number, "big") + 1
    publisher.close()


def test_what_was_missed_can_be_had_again(tmp_path: Path) -> None:
    config = KvEventsConfig(
        publisher="zmq", endpoint=f"ipc://{tmp_path}/e", replay_endpoint=f"ipc://{tmp_path}/r", buffer_steps=3
    )
    publisher = KvEventPublisher(config)
    with listener(zmq.DEALER, str(config.replay_endpoint)) as asker:
        asker.send_multipart((b"no", b"way", b"to", b"ask"))
        for _ in range(5):
            publisher.publish(EVENTS)
        found: list[int] = []
        while found != [3, 4, -1]:  # the publisher's thread may still be behind
            found.clear()
            asker.send_multipart((b"", (3).to_bytes(8, "big")))
            while -1 not in found:
                empty, number, payload = asker.recv_multipart()
                found.append(int.from_bytes(number, "big", signed=True))
                assert empty == b""
                assert bool(payload) == (found[-1] != -1)
        asker.send_multipart((b"", (0).to_bytes(8, "big")))
        assert int.from_bytes(asker.recv_multipart()[1], "big") == 2  # the last three are kept
    publisher.close()


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    config = KvEventsConfig(publisher="zmq", endpoint=f"ipc://{tmp_path}/no/such/folder")
    with pytest.raises(ConfigError, match="cannot be used"):
        KvEventPublisher(config)


def test_a_publisher_that_is_behind_leaves_a_gap(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(KvEventPublisher, "_run", lambda self: None)
    config = KvEventsConfig(publisher="zmq", endpoint=f"ipc://{tmp_path}/e", max_queue_size=2)
    publisher = KvEventPublisher(config)
    for _ in range(4):
        publisher.publish(EVENTS)
    assert [number for number, _ in publisher._waiting] == [0, 1]
    publisher.close()
