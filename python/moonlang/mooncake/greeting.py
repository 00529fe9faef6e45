"""How two endpoints meet: both prove that they know the cluster's token, and agree on the memory between them.

    dialler   Hello    ->           who I am, whom I want, how large the ring is
    acceptor       <-  Welcome      who I am, and the proof for your nonce; or Rejected
    dialler   Proof    ->           the proof for your nonce; on one host with the ring's memory and a bell
    acceptor       <-  Accepted     on one host with a bell; else where to write to

A proof is a MAC, under the token, of both nonces and all that the Hello says: it fits no other connection, and not the
other direction.
Length-prefixed msgpack of these types; everything before the proof is bounded by MAX_BYTES and by the deadline.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
from typing import Final, TypeVar

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError

VERSION: Final = 1
MAX_BYTES: Final = 4096
MAX_FDS: Final = 2
GREETING_NS: Final = 2 * NS_PER_S
NONCE_BYTES: Final = 32

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """instance: drawn anew by every endpoint. stream: of this dialler's connections to `to`, the same one again when a
    connection is resumed."""

    version: int
    source: str
    to: str
    instance: bytes
    stream: bytes
    nonce: bytes
    ring_bytes: int
    arena_bytes: int


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=True):
    instance: bytes
    nonce: bytes
    mac: bytes


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag=True):
    error: str


class Proof(msgspec.Struct, frozen=True, array_like=True, tag=True):
    mac: bytes


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Empty on one host. session, address: of the ring at the acceptor's transfer engine. tag: see engine.Peer.
    produced, consumed, released: what the acceptor has of this stream already."""

    session: str = ""
    address: int = 0
    tag: bytes = b""
    produced: int = 0
    consumed: int = 0
    released: int = 0


Word = Hello | Welcome | Rejected | Proof | Accepted
T = TypeVar("T", Hello, Welcome, Proof, Accepted)
_decoder = msgspec.msgpack.Decoder(Word)


class Talk:
    """One side of a greeting on a connected stream socket. fds: what came along, the caller's to close."""

    def __init__(self, sock: socket.socket, patience_ns: int = GREETING_NS) -> None:
        self.fds: list[int] = []
        self.sock = sock
        self._deadline_ns = monotonic_ns() + patience_ns
        self._unread = bytearray()

    def say(self, word: Word, fds: tuple[int, ...] = ()) -> None:
        """PeerError when the peer is gone."""
        body = msgspec.msgpack.encode(word)
        self._set_timeout()
        try:
            if fds:
                socket.send_fds(self.sock, [_LENGTH.pack(len(body)) + body], list(fds))
            else:
                self.sock.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise PeerError(f"A greeting broke off: {error}.") from error

    def hear(self, kind: type[T]) -> T:
        """The next word. PeerError: gone, too slow, rejected, or not what belongs here."""
        size = _LENGTH.unpack(self._take(_LENGTH.size))[0]
        if size > MAX_BYTES:
            raise PeerError(f"A greeting of {size} bytes is over the limit of {MAX_BYTES}.")
        try:
            word = _decoder.decode(self._take(size))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError(f"A greeting of {size} bytes is none: {error}.") from None
        if isinstance(word, Rejected):
            raise PeerError(f"The peer does not want us: {word.error}")
        if not isinstance(word, kind):
            raise PeerError(f"A greeting has {type(word).__name__} in place of {kind.__name__}.")
        return word

    def close_fds(self) -> None:
        """Close what came along and was not taken."""
        while self.fds:
            os.close(self.fds.pop())

    def _take(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._set_timeout()
            try:
                if self.sock.family == socket.AF_UNIX:
                    room = MAX_FDS - len(self.fds)
                    chunk, fds, _, _ = socket.recv_fds(
                        self.sock, size - len(self._unread), room, socket.MSG_CMSG_CLOEXEC
                    )
                    self.fds += fds
                else:
                    chunk = self.sock.recv(size - len(self._unread))
            except OSError as error:
                raise PeerError(f"A greeting broke off: {error}.") from error
            if not chunk:
                raise PeerError("A greeting broke off: the peer is gone.")
            self._unread += chunk
        taken = bytes(self._unread[:size])
        del self._unread[:size]
        return taken

    def _set_timeout(self) -> None:
        left_ns = self._deadline_ns - monotonic_ns()
        if left_ns <= 0:
            raise PeerError("A greeting takes too long.")
        self.sock.settimeout(left_ns / NS_PER_S)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(token: str, side: str, hello: Hello, nonce: bytes) -> bytes:
    """The MAC of `side` ("dialler" or "acceptor"); nonce: the acceptor's."""
    said = msgspec.msgpack.encode((side, hello, nonce))
    return hmac.digest(token.encode(), said, hashlib.sha256)


def same(mac: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(mac, expected)
