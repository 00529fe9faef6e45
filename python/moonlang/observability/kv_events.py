"""Publishes what the prefix tree gains and loses, as SGLang does: on a PUB socket, and again on a ROUTER socket.

A message on the PUB socket is [topic, number as 8 bytes big-endian, msgpack of a KvEventBatch]. Who has missed some
sends [b"", first number] to the ROUTER socket, and gets [b"", number, batch] for each that is still kept, then number
-1. This is a protocol for programs outside; it is ZMQ whatever --messaging-backend is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import zmq

from moonlang.base import log
from moonlang.base.clock import wall_s
from moonlang.base.errors import ConfigError
from moonlang.base.wakeup import Wakeup
from moonlang.config.kv_events import KvEventsConfig
from moonlang.core.kv_events import KvEvent, KvEventBatch

_END: Final = (-1).to_bytes(8, "big", signed=True)
_CLOSE_S: Final = 2.0

_log = log.get(__name__)


class KvEventPublisher:
    """`publish` never blocks; a thread encodes and sends."""

    def __init__(self, config: KvEventsConfig) -> None:
        """ConfigError when an address cannot be used."""
        self._config = config
        self._context = zmq.Context(io_threads=1)
        self._pub = self._open(zmq.PUB, config.endpoint)
        self._router = None if config.replay_endpoint is None else self._open(zmq.ROUTER, config.replay_endpoint)
        self._topic = config.topic.encode()
        self._number = 0
        self._waiting: deque[tuple[int, KvEventBatch]] = deque()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._encoder = msgspec.msgpack.Encoder()
        self._wakeup = Wakeup()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[KvEvent]) -> None:
        """As one batch. When too many wait it is dropped: subscribers see a gap in the numbers."""
        number, self._number = self._number, self._number + 1
        if len(self._waiting) >= self._config.max_queue_size:
            _log.error("KV events %d are dropped: %d batches wait to be sent.", number, len(self._waiting))
            return
        self._waiting.append((number, KvEventBatch(wall_s(), list(events), self._config.dp_rank)))
        self._wakeup.set()

    def close(self) -> None:
        """Send what waits, briefly, then free the sockets."""
        self._closing = True
        self._wakeup.set()
        self._thread.join(_CLOSE_S)
        self._context.destroy(linger=0)
        self._wakeup.close()

    def _open(self, kind: int, address: str) -> zmq.Socket[bytes]:
        found = self._context.socket(kind)
        found.set(zmq.SNDHWM, self._config.hwm)
        found.set(zmq.LINGER, 0)
        try:
            if "*" in address or "::" in address or not address.startswith("tcp://"):
                found.bind(address)
            else:
                found.connect(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"--kv-events-config: {address} cannot be used: {error}.") from error
        return found

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        if self._router is not None:
            poller.register(self._router, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            self._wakeup.clear()
            self._send()
            if self._router is not None and self._router in ready:
                self._replay(self._router)
        self._send()

    def _send(self) -> None:
        while self._waiting:
            number, batch = self._waiting.popleft()
            kept = number.to_bytes(8, "big"), self._encoder.encode(batch)
            self._kept.append(kept)
            self._pub.send_multipart((self._topic, *kept))

    def _replay(self, router: zmq.Socket[bytes]) -> None:
        """A subscriber that takes nothing loses its answers: a ROUTER drops what its peer has no room for."""
        asked = router.recv_multipart()
        if len(asked) != 3 or len(asked[2]) != 8:
            _log.error("A replay of KV events was asked for in %d frames, which is not how.", len(asked))
            return
        peer, first = asked[0], asked[2]
        for number, batch in self._kept:
            if number >= first:
                router.send_multipart((peer, b"", number, batch))
        router.send_multipart((peer, b"", _END, b""))
