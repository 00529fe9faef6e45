"""What travels between two instances: length-prefixed msgpack of these types, nothing else.

    connector  Hello  ->            who I am
    acceptor         <-  Hello      and I
    connector  Proof  ->            I know the cluster's token
    acceptor         <-  Proof      and I, and I reach you where you say that you listen
    then       Where, Here, Beat and the messages of core.pairing, in any order

Instead of its next line the acceptor may say Rejected, and that is the end.

A connection may instead begin with Ask, which is answered by Alive and the end.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import msgspec

from moonlang.base.errors import PeerError
from moonlang.core import layout
from moonlang.core.pairing import Drained, KvCard, Landed, Noted, Pushed, Refuse, Release, Want

VERSION = 1
TOKEN_VARIABLE = "MOONLANG_CLUSTER_TOKEN"  # environment: what all instances of a cluster know
MAX_FRAME_BYTES = 8 << 20  # a Want of a million tokens with page size 1 is 5 MB
MAX_GREETING_BYTES = 64 << 10  # before the peer has proved who it is

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """role: "prefill" or "decode". address: where the sender listens, as it thinks others can reach it.
    sums: how it computes checksums, "off" when it does not. pid: of its process, for those on the same host."""

    version: int
    role: str
    card: KvCard
    pid: int
    address: tuple[str, int]
    sums: str
    nonce: bytes


class Proof(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """mac: of the other side's nonce and who proves it, under the cluster's token."""

    mac: bytes


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The connection is not wanted, and why."""

    error: str


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I am still here."""


class Where(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tell me when you have the request of this room."""

    room: int


class Here(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """I have the request of this room."""

    room: int


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Who is there?"""


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """This instance is."""

    instance: str


Pair = Want | Noted | Pushed | Landed | Release | Drained | Refuse
Frame = Hello | Proof | Rejected | Beat | Where | Here | Ask | Alive | Pair

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self.limit = MAX_GREETING_BYTES
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that are complete. PeerError: too long, or not one of ours."""
        self._bytes += chunk
        frames: list[Frame] = []
        at = 0
        while len(self._bytes) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._bytes, at)
            if size > self.limit:
                raise PeerError(f"A frame of {size} bytes is over the limit of {self.limit} bytes.")
            end = at + _LENGTH.size + size
            if len(self._bytes) < end:
                break
            try:
                frames.append(_decoder.decode(bytes(self._bytes[at + _LENGTH.size : end])))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise PeerError(f"A frame of {size} bytes is not a message: {error}.") from None
            at = end
        del self._bytes[:at]
        return frames


def prove(token: str, prover: Hello, nonce: bytes) -> Proof:
    """nonce: of the one to whom it is proved."""
    return Proof(_mac(token, prover, nonce))


def proved(proof: Proof, token: str, prover: Hello, nonce: bytes) -> bool:
    return hmac.compare_digest(proof.mac, _mac(token, prover, nonce))


def _mac(token: str, prover: Hello, nonce: bytes) -> bytes:
    """Role and instance are in it, so that nobody's proof can be sent back to him or passed off as another's."""
    return hmac.digest(token.encode(), msgspec.json.encode((prover.role, prover.card.instance)) + nonce, hashlib.sha256)


def mismatch(here: Hello, there: Hello) -> str:
    """Why these two cannot serve a request together, with the values of both; "" when they can."""
    if there.role == here.role:
        return f"Both are {here.role} instances."
    for name, ours, theirs in (
        ("the version of the protocol", here.version, there.version),
        ("--disaggregation-transfer-backend", here.card.backend, there.card.backend),
        ("checksums (--disaggregation-enable-kv-checksum)", here.sums, there.sums),
    ):
        if ours != theirs:
            return f"The instances differ in {name}: {ours} and {theirs}."
    return layout.mismatch(here.card.regions, there.card.regions)
