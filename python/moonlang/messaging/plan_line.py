"""The line on which rank 0 hands its plans to the other ranks: one stream socket each, frames with their length first.

Not an Endpoint: the thread that runs the model sends, and the order of plans is all that matters.
"""

from __future__ import annotations

import select
import socket
import struct
from contextlib import suppress
from pathlib import Path

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.base.errors import ConfigError, PeerError

MAX_BYTES = 256 << 20
_JOIN_S = 120.0  # the processes of a busy machine start slowly
_SEND_S = 60.0  # a rank that lives reads between two steps
_RETRY_S = 0.02
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_TCP = "tcp://"


def _socket(address: str) -> tuple[socket.socket, str | tuple[str, int]]:
    """address: the path of a socket, or "tcp://host:port"."""
    if not address.startswith(_TCP):
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), address
    host, _, port = address.removeprefix(_TCP).rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"{address} is no address.", hint="Like --dist-init-addr 10.0.0.1:5000.")
    made = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made, (host.strip("[]"), int(port))


class PlanSender:
    """Rank 0's end."""

    def __init__(self, address: str, receivers: int, join_s: float = _JOIN_S) -> None:
        """Waits until all receivers have connected; PeerError when they do not within `join_s`."""
        listener, where = _socket(address)
        with listener:
            if isinstance(where, tuple):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(receivers)
            deadline_ns = monotonic_ns() + int(join_s * NS_PER_S)
            self._peers: list[socket.socket] = []
            while len(self._peers) < receivers:
                listener.settimeout(max(0.001, (deadline_ns - monotonic_ns()) / NS_PER_S))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    self.close()
                    raise PeerError(
                        f"{receivers - len(self._peers)} of {receivers} ranks have not come within {join_s:g} s."
                    ) from None
                peer.settimeout(_SEND_S)
                self._peers.append(peer)
        if isinstance(where, str):
            Path(where).unlink(missing_ok=True)

    def send(self, frame: bytes) -> None:
        """To every receiver, in order. PeerError when one is gone or no longer reads."""
        head = _LENGTH.pack(len(frame))
        for peer in self._peers:
            try:
                peer.sendall(head + frame)
            except OSError as error:
                raise PeerError(f"A rank does not take its plans: {error}.", hint="Start the server again.") from error

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


class PlanReceiver:
    """The end of any other rank. ended: rank 0 is gone, or has closed the line."""

    def __init__(self, address: str, join_s: float = _JOIN_S) -> None:
        """Connects, as soon as rank 0 listens; PeerError when it does not within `join_s`."""
        deadline_ns = monotonic_ns() + int(join_s * NS_PER_S)
        while True:
            self._peer, where = _socket(address)
            try:
                self._peer.connect(where)
                break
            except OSError as error:
                self._peer.close()
                if monotonic_ns() > deadline_ns:
                    raise PeerError(f"Rank 0 does not listen at {address}: {error}.") from error
                sleep_s(_RETRY_S)
        self._peer.setblocking(False)
        self._rest = bytearray()
        self.ended = False

    def fileno(self) -> int:
        """Readable when `recv` has something."""
        return self._peer.fileno()

    def recv(self) -> list[bytes]:
        """The frames that have come; never blocks. PeerError when one is too long."""
        with suppress(BlockingIOError):
            while not self.ended:
                try:
                    chunk = self._peer.recv(_READ_BYTES)
                except ConnectionError:
                    chunk = b""
                self.ended = not chunk
                self._rest += chunk
        frames: list[bytes] = []
        while len(self._rest) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._rest)
            if length > MAX_BYTES:
                raise PeerError(f"A plan of {length} bytes is over the limit of {MAX_BYTES}.")
            if len(self._rest) < _LENGTH.size + length:
                break
            frames.append(bytes(self._rest[_LENGTH.size : _LENGTH.size + length]))
            del self._rest[: _LENGTH.size + length]
        return frames

    def wait(self, timeout_s: float) -> None:
        """Block until there is something to receive."""
        select.select([self._peer], [], [], timeout_s)

    def close(self) -> None:
        self._peer.close()
