"""Envelopes as msgpack arrays: typed on both sides, bounded in size, and never code (no pickle)."""

from __future__ import annotations

import msgspec

from moonlang.base.errors import PeerError, RequestError
from moonlang.core.messages import Envelope

MAX_BYTES = 256 << 20  # prompt logprobs of a full chunk with 20 alternatives per position take a few MB


class Codec:
    """Encoder and decoder of one endpoint; not shared between threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Envelope)

    def encode(self, envelope: Envelope) -> bytes:
        """The frame for one envelope. PeerError: it is too large. RequestError: a text in it is not Unicode."""
        try:
            frame = self._encoder.encode(envelope)
        except UnicodeEncodeError as error:
            raise RequestError(f"A text cannot be sent: {error}.") from error
        if len(frame) > self._max_bytes:
            raise self._too_large(envelope, len(frame))
        return frame

    def encode_into(self, envelope: Envelope, frame: bytearray) -> None:
        """The same as `encode`, in place of what `frame` holds: its memory is used again."""
        try:
            self._encoder.encode_into(envelope, frame)
        except UnicodeEncodeError as error:
            raise RequestError(f"A text cannot be sent: {error}.") from error
        if len(frame) > self._max_bytes:
            raise self._too_large(envelope, len(frame))

    def decode(self, frame: bytes | bytearray | memoryview) -> Envelope:
        """The envelope in a frame. PeerError when the frame is too large or not an Envelope."""
        if len(frame) > self._max_bytes:
            raise PeerError(f"A frame of {len(frame)} bytes is over the limit of {self._max_bytes} bytes.")
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError(f"A frame of {len(frame)} bytes is not a message: {error}.") from error

    def _too_large(self, envelope: Envelope, size: int) -> PeerError:
        return PeerError(
            f"A {type(envelope.body).__name__} of {size} bytes for {envelope.to!r} is over the limit of "
            f"{self._max_bytes} bytes."
        )
