"""The sockets of a link: a listening one, and connections made and accepted; one `turn` handles what is ready."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from moonlang.base.errors import ConfigError, PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.disaggregation.connection import Address, Connection, Stage
from moonlang.disaggregation.frames import Frame

_ANY_HOST = ("0.0.0.0", "::")
_BACKLOG = 128
_MAX_CONNECTIONS = 4096


@dataclass(frozen=True, slots=True)
class Came:
    """A frame has arrived; None: the connection that was dialled stands."""

    connection: Connection
    frame: Frame | None


@dataclass(frozen=True, slots=True)
class Broke:
    """A connection has ended. refused: there was an answer from the address, that nobody listens there."""

    connection: Connection
    why: str
    refused: bool = False


Event = Came | Broke
Clock = Callable[[], int]


class Wire:
    """Owned by one thread; `wakeup` ends a turn early. host: as in --host; ConfigError: no such address."""

    def __init__(self, host: str, wakeup: Wakeup) -> None:
        self.connections: set[Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._wakeup = wakeup
        self._listener = _listen(host)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(wakeup.fileno(), selectors.EVENT_READ)
        self._writing: set[Connection] = set()

    @property
    def address(self) -> Address:
        """Where it listens, numeric; the host is "" when that is every address of this machine."""
        host, port = self._listener.getsockname()[:2]
        return ("" if host in _ANY_HOST else host), port

    def dial(self, address: Address, now_ns: int) -> Connection:
        """Begin to connect. OSError when it cannot even begin."""
        connection = Connection.dial(address, now_ns)
        self._add(connection)
        return connection

    def drop(self, connection: Connection) -> None:
        """Close a connection; nothing more is heard of it."""
        if connection in self.connections:
            self.connections.discard(connection)
            self._writing.discard(connection)
            self._selector.unregister(connection.sock)
            connection.close()

    def turn(self, timeout_s: float | None, clock: Clock) -> list[Event]:
        """Wait until something is ready or the time is up, then handle it all."""
        self._watch_writes()
        ready = self._selector.select(timeout_s)
        now_ns = clock()
        events: list[Event] = []
        for key, mask in ready:
            connection = key.data
            if connection is None:
                if key.fileobj is self._listener:
                    self._accept(now_ns)
                else:
                    self._wakeup.clear()
            elif connection in self.connections:
                events += self._serve(connection, mask, now_ns)
        return events

    def close(self) -> None:
        for connection in list(self.connections):
            self.drop(connection)
        self._listener.close()
        self._selector.close()

    def _add(self, connection: Connection) -> None:
        self.connections.add(connection)
        self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def _accept(self, now_ns: int) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            sock, _ = self._listener.accept()
            if len(self.connections) >= _MAX_CONNECTIONS:
                sock.close()
            else:
                self._add(Connection(sock, now_ns))

    def _serve(self, connection: Connection, mask: int, now_ns: int) -> list[Event]:
        events: list[Event] = []
        try:
            if connection.stage is Stage.CONNECTING:
                connection.finish_connect()
                events.append(Came(connection, None))
                connection.stage = Stage.GREETING
            if mask & selectors.EVENT_WRITE:
                connection.flush()
            if mask & selectors.EVENT_READ:
                events += [Came(connection, frame) for frame in connection.receive(now_ns)]
        except (PeerError, OSError) as error:
            refused = isinstance(error, ConnectionRefusedError)
            events.append(Broke(connection, str(error.strerror if isinstance(error, OSError) else error), refused))
            self.drop(connection)
        return events

    def _watch_writes(self) -> None:
        """Ask for writability exactly where bytes wait; end those that have said their last words."""
        for connection in [one for one in self.connections if one.done]:
            self.drop(connection)
        wanted = {one for one in self.connections if one.wants_to_write}
        for connection in wanted ^ self._writing:
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection in wanted else 0)
            self._selector.modify(connection.sock, mask, connection)
        self._writing = wanted


def _listen(host: str) -> socket.socket:
    """A socket on a free port of `host`, of all addresses when it names none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} cannot be used: {error}.") from error
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}: {error}.", hint="Give --host an address of this machine."
        ) from error
    return listener
