"""Messages between the processes of one host: PUSH/PULL over `ipc://` sockets in the server's run directory.

Every process binds one PULL socket, its inbox, and connects one PUSH socket to each peer it talks to. Both sides hold
at most `capacity` messages; past that a send waits for `send_timeout_ns` and gives up with PeerError.
"""

from __future__ import annotations

import select
from collections.abc import Sequence as Seq

import zmq

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup, wait_ms
from moonlang.core.messages import Envelope, Message
from moonlang.messaging.codec import MAX_BYTES, Codec
from moonlang.messaging.sequence import Sequence

CAPACITY = 8192  # messages; at one message per step and peer that is more than half a minute of a fast model
SEND_TIMEOUT_NS = 1000 * NS_PER_MS
_LINGER_MS = 200  # how long `close` waits for a peer to take the last messages
_RECONNECT_MS = 10

_log = log.get(__name__)


class ZmqEndpoint:
    """An Endpoint over zmq. Owned by one thread at a time.

    zmq's own descriptor is edge-triggered: it may stay silent while messages are waiting. `fileno` is therefore an
    epoll descriptor over zmq's one and an eventfd that is raised whenever messages are known to be left in the inbox,
    so that it can be handed to `select`, `asyncio.add_reader` and the like.
    """

    def __init__(
        self,
        name: str,
        addresses: dict[str, str],
        *,
        capacity: int = CAPACITY,
        send_timeout_ns: int = SEND_TIMEOUT_NS,
    ) -> None:
        self.name = name
        self._addresses = addresses
        self._capacity = capacity
        self._send_timeout_ms = max(1, send_timeout_ns // NS_PER_MS)
        self._codec = Codec()
        self._sequence = Sequence()
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set(zmq.RCVHWM, capacity)
        self._inbox.set(zmq.MAXMSGSIZE, MAX_BYTES)
        self._inbox.set(zmq.LINGER, 0)
        self._inbox.bind(addresses[name])
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._left = Wakeup()
        self._left_known = False
        self._epoll = select.epoll()
        self._epoll.register(self._inbox.FD, select.EPOLLIN)
        self._epoll.register(self._left.fileno(), select.EPOLLIN)
        self._pollers: dict[tuple[int, ...], zmq.Poller] = {}

    def send(self, to: str, body: Message) -> None:
        """Queue one message. PeerError when the peer does not make room within the send timeout, or is unknown."""
        peer = self._peers.get(to) or self._connect(to)
        frame = self._codec.encode(Envelope(to=to, source=self.name, seq=self._sequence.peek(to), body=body))
        try:
            peer.send(frame)  # SNDTIMEO bounds the wait
        except zmq.Again:
            raise PeerError(
                f"The inbox of {to!r} stays full: {self._capacity} messages wait and none was taken within "
                f"{self._send_timeout_ms} ms."
            ) from None
        self._sequence.sent(to)

    def recv(self, most: int = 256) -> list[Envelope]:
        """Up to `most` messages that have arrived; never blocks."""
        found: list[Envelope] = []
        for _ in range(most):
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                self._set_left(False)
                return found
            try:
                envelope = self._codec.decode(frame)
            except PeerError as error:
                _log.error("A message to %s is dropped. %s", self.name, error)
                continue
            if self._sequence.admit(envelope):
                found.append(envelope)
        self._set_left(True)
        return found

    def wait(self, timeout_ns: int, *, also: Seq[int] = ()) -> None:
        """Block until a message is there, a descriptor in `also` is readable, or the time is up (whole ms)."""
        key = tuple(also)
        poller = self._pollers.get(key) or self._poller(key)
        ready = poller.poll(wait_ms(timeout_ns))
        if any(found is self._inbox for found, _ in ready):
            self._set_left(True)  # asking zmq has silenced its descriptor

    def fileno(self) -> int:
        """Readable when a message may have come."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Let the last messages leave (briefly), then free the sockets. May be called twice."""
        if self._inbox.closed:
            return
        self._inbox.close()
        for peer in self._peers.values():
            peer.close()
        self._context.term()
        self._epoll.close()
        self._left.close()

    def _connect(self, to: str) -> zmq.Socket[bytes]:
        if to not in self._addresses:
            raise PeerError(f"{self.name!r} knows no peer {to!r}.")
        peer = self._context.socket(zmq.PUSH)
        peer.set(zmq.SNDHWM, self._capacity)
        peer.set(zmq.SNDTIMEO, self._send_timeout_ms)
        peer.set(zmq.LINGER, _LINGER_MS)
        peer.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        peer.connect(self._addresses[to])
        self._peers[to] = peer
        return peer

    def _poller(self, also: tuple[int, ...]) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        for fd in also:
            poller.register(fd, zmq.POLLIN)
        self._pollers[also] = poller
        return poller

    def _set_left(self, left: bool) -> None:
        if left != self._left_known:
            self._left_known = left
            if left:
                self._left.set()
            else:
                self._left.clear()


def open_mailbox(name: str, addresses: dict[str, str], token: str) -> ZmqEndpoint:
    """The endpoint of --messaging-backend zmq. The token has no use here: the folder of the sockets is private."""
    return ZmqEndpoint(name, addresses)


BACKEND = open_mailbox
