"""What a single token stands for: bytes or text that can be joined to the text of the whole sequence.

Two families cover nearly every model: byte-level BPE (GPT-2, Llama 3, Qwen), where each token is a string of bytes, and
SentencePiece-like ones (Llama 2, Mistral, Gemma), where a token is text with U+2581 for a space, or one raw byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from enum import Enum
from typing import Any

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Family(Enum):
    BYTE_LEVEL = "byte level"
    SENTENCE_PIECE = "sentence piece"


class Pieces:
    """Token id -> piece, worked out on first use: bytes, or str for SentencePiece text; empty when skipped."""

    def __init__(self, family: Family, id_to_token: Callable[[int], str | None], skipped: Container[int]) -> None:
        self.family = family
        self._id_to_token = id_to_token
        self._skipped = skipped
        self._known: dict[int, bytes | str] = {}

    @classmethod
    def of(
        cls, decoder: dict[str, Any] | None, id_to_token: Callable[[int], str | None], skipped: Container[int]
    ) -> Pieces | None:
        """Pieces for a `tokenizers` decoder section; None when the decoder is of another family."""
        family = _family(decoder)
        return None if family is None else cls(family, id_to_token, skipped)

    def __getitem__(self, token: int) -> bytes | str:
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self._work_out(token)
        return piece

    def _work_out(self, token: int) -> bytes | str:
        text = None if token in self._skipped or token < 0 else self._id_to_token(token)
        if self.family is Family.BYTE_LEVEL:
            return _byte_level(text or "")
        if text is None:
            return ""
        raw = _BYTE.fullmatch(text)
        return bytes([int(raw[1], 16)]) if raw else text.replace(_SPACE, " ")


def _family(decoder: dict[str, Any] | None) -> Family | None:
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return Family.BYTE_LEVEL
    if decoder["type"] == "Sequence":
        steps = [(step["type"], step.get("content")) for step in decoder["decoders"]]
        if steps == [("ByteLevel", None)]:
            return Family.BYTE_LEVEL
        # Strip takes the space that the encoder put before a text; output goes on after a prompt, where it must stay.
        if steps[:3] == [("Replace", " "), ("ByteFallback", None), ("Fuse", None)] and steps[3:] in (
            [],
            [("Strip", " ")],
        ):
            return Family.SENTENCE_PIECE
    return None


def _byte_level(token: str) -> bytes:
    """Bytes of a byte-level token; added tokens with characters outside the alphabet stand for themselves."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the other 68 take the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
