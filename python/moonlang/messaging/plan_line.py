"""The line on which rank 0 hands its plans to the other ranks: one stream socket each, frames with their length first.

In a pipeline the last stage hands its results to rank 0 in the same way.

Not an Endpoint: the thread that runs the model sends, and the order of plans is all that matters.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import select
import socket
import struct
from contextlib import suppress
from pathlib import Path

from moonlang.base import log
from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.base.errors import ConfigError, PeerError

MAX_BYTES = 256 << 20
JOIN_S = 120.0  # the processes of a busy machine start slowly
SEND_S = 60.0  # a rank that lives reads between two steps
_GREETING_S = 2.0
_RETRY_S = 0.02
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_TCP = "tcp://"

_log = log.get(__name__)


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


def accept(address: str, receivers: int, join_s: float, token: str) -> list[socket.socket]:
    """Connections of all receivers, in the order they came. PeerError when they do not within `join_s`."""
    listener, where = _socket(address)
    peers: list[socket.socket] = []
    with listener:
        if isinstance(where, tuple):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(receivers)
        deadline_ns = monotonic_ns() + int(join_s * NS_PER_S)
        while len(peers) < receivers:
            listener.settimeout(max(0.001, (deadline_ns - monotonic_ns()) / NS_PER_S))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                for peer in peers:
                    peer.close()
                raise PeerError(
                    f"{receivers - len(peers)} of {receivers} ranks have not come within {join_s:g} s."
                ) from None
            if _knows_token(peer, token):
                peers.append(peer)
            else:
                _log.error("Somebody who does not know the cluster's token wants plans at %s, and gets none.", address)
                peer.close()
    if isinstance(where, str):
        Path(where).unlink(missing_ok=True)
    return peers


def connect(address: str, join_s: float, token: str) -> socket.socket:
    """To rank 0, as soon as it listens. PeerError when it does not within `join_s`, or does not know the token."""
    deadline_ns = monotonic_ns() + int(join_s * NS_PER_S)
    while True:
        peer, where = _socket(address)
        try:
            peer.connect(where)
            break
        except OSError as error:
            peer.close()
            if monotonic_ns() > deadline_ns:
                raise PeerError(f"Rank 0 does not listen at {address}: {error}.") from error
            sleep_s(_RETRY_S)
    peer.settimeout(join_s)  # rank 0 may still be greeting another
    nonce = secrets.token_bytes(_NONCE_BYTES)
    try:
        theirs = _exactly(peer, _NONCE_BYTES)
        peer.sendall(nonce + _mac(token, b"rank", theirs + nonce))
        if hmac.compare_digest(_exactly(peer, _MAC_BYTES), _mac(token, b"lead", theirs + nonce)):
            return peer
    except OSError:
        pass
    peer.close()
    hint = "Every node needs the same MOONLANG_CLUSTER_TOKEN, or none."
    raise PeerError(f"Rank 0 at {address} does not share this cluster's token, or is gone.", hint=hint)


def _knows_token(peer: socket.socket, token: str) -> bool:
    """The side of rank 0; also proves that this one knows it."""
    peer.settimeout(_GREETING_S)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    try:
        peer.sendall(nonce)
        said = _exactly(peer, _NONCE_BYTES + _MAC_BYTES)
        both = nonce + said[:_NONCE_BYTES]
        if not hmac.compare_digest(said[_NONCE_BYTES:], _mac(token, b"rank", both)):
            return False
        peer.sendall(_mac(token, b"lead", both))
    except OSError:
        return False
    return True


def _exactly(peer: socket.socket, size: int) -> bytes:
    """OSError: it is gone, or too slow."""
    found = bytearray()
    while len(found) < size:
        chunk = peer.recv(size - len(found))
        if not chunk:
            raise ConnectionResetError("The peer is gone.")
        found += chunk
    return bytes(found)


def _mac(token: str, side: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token.encode(), side + nonces, hashlib.sha256)


class PlanSender:
    """Rank 0's end. token: what whoever connects must know."""

    def __init__(
        self, address: str, receivers: int, join_s: float = JOIN_S, token: str = "", *, listens: bool = True
    ) -> None:
        """Waits until all receivers have connected; PeerError when they do not within `join_s`.

        listens: False when the one receiver does, for there its end is known to be.
        """
        self._peers = accept(address, receivers, join_s, token) if listens else [connect(address, join_s, token)]
        for peer in self._peers:
            peer.settimeout(SEND_S)

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

    def __init__(self, address: str, join_s: float = JOIN_S, token: str = "", *, listens: bool = False) -> None:
        """Connects, as soon as rank 0 listens; PeerError when it does not within `join_s`. listens: see PlanSender."""
        self._peer = accept(address, 1, join_s, token)[0] if listens else connect(address, join_s, token)
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
