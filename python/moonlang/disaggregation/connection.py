"""One TCP connection of a link: never blocks, bounded in both directions."""

from __future__ import annotations

import os
import socket
from enum import Enum

from moonlang.base.errors import PeerError
from moonlang.disaggregation.frames import MAX_FRAME_BYTES, Frame, Hello, Unpacker, encode

MAX_UNSENT_BYTES = 16 << 20
USER_TIMEOUT_MS = 5000  # sent bytes that nobody acknowledges for so long end the connection
_READ_BYTES = 1 << 18

Address = tuple[str, int]


class Stage(Enum):
    """How far a connection has come."""

    CONNECTING = "connecting"
    GREETING = "greeting"  # hellos are exchanged
    UP = "up"
    ASKING = "asking"  # only wants to know who is there
    LEAVING = "leaving"  # sends its last words, then closes
    CLOSED = "closed"


class Connection:
    """A non-blocking socket with frames on it. Owned by the link's thread.

    dialled: the address, when this side connected; reached: somebody took the connection. own, hello: what this side
    and the peer said of themselves.
    """

    def __init__(self, sock: socket.socket, now_ns: int, dialled: Address | None = None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self.sock = sock
        self.dialled = dialled
        self.stage = Stage.CONNECTING if dialled else Stage.GREETING
        self.reached = dialled is None
        self.own: Hello | None = None
        self.hello: Hello | None = None
        self.heard_ns = now_ns
        self.sent_ns = now_ns
        self.began_ns = now_ns
        self._unpacker = Unpacker()
        self._unsent = bytearray()

    @classmethod
    def dial(cls, address: Address, now_ns: int) -> Connection:
        """Begin to connect; the outcome comes with writability. OSError when it cannot even begin."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection = cls(sock, now_ns, address)
            sock.connect(address)
        except BlockingIOError:
            pass  # under way
        except OSError:
            sock.close()
            raise
        return connection

    @property
    def instance(self) -> str:
        """Of the peer; "" before it has said so."""
        return self.hello.card.instance if self.hello is not None else ""

    @property
    def wants_to_write(self) -> bool:
        return self.stage is Stage.CONNECTING or bool(self._unsent)

    @property
    def done(self) -> bool:
        """Its last words are out."""
        return self.stage is Stage.LEAVING and not self._unsent

    def finish_connect(self) -> None:
        """OSError when nobody answered at the address."""
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self.reached = True

    def trust(self) -> None:
        """The peer has proved itself."""
        self.stage = Stage.UP
        self._unpacker.limit = MAX_FRAME_BYTES

    def send(self, frame: Frame, now_ns: int) -> None:
        """Queue a frame and send what goes. PeerError when the peer does not take its bytes, or is gone."""
        self._unsent += encode(frame)
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise PeerError(f"{len(self._unsent)} bytes wait for a peer that takes none.")
        self.sent_ns = now_ns
        if self.stage is not Stage.CONNECTING:
            self.flush()

    def flush(self) -> None:
        """PeerError when the peer is gone."""
        while self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerError(f"The connection broke: {error.strerror}.") from error
            del self._unsent[:sent]

    def receive(self, now_ns: int) -> list[Frame]:
        """What has come. PeerError: the connection is closed or broken, or what came is no message."""
        try:
            chunk = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise PeerError(f"The connection broke: {error.strerror}.") from error
        if not chunk:
            raise PeerError("The peer closed the connection.")
        self.heard_ns = now_ns
        return self._unpacker.feed(chunk)

    def close(self) -> None:
        self.stage = Stage.CLOSED
        self.sock.close()
