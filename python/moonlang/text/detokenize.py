"""Text of a growing sequence, token by token: no character is shown before it is complete, and none twice.

The concatenation of what `push` and `finish` return is the text of the whole output as it continues the prompt. It is
what the tokenizer decodes from all tokens at once, apart from the leading space that SentencePiece models drop there.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from typing import Protocol

from moonlang.text.pieces import Family, Pieces
from moonlang.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # decoded again with each new token by tokenizers that only know whole texts


class TextStream(Protocol):
    """The incremental detokenizer of one sequence."""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is complete now and was not before."""
        ...

    def finish(self) -> str:
        """The rest: what never became a character, shown as U+FFFD."""
        ...


class ByteLevelStream:
    """Tokens are bytes; a character may be spread over several."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._partial = b""

    def push(self, tokens: Iterable[int]) -> str:
        pieces = self._pieces
        raw = self._partial + b"".join([pieces[token] for token in tokens])  # type: ignore[misc]
        text, used = utf_8_decode(raw, "replace", False)
        self._partial = raw[used:]
        return text

    def finish(self) -> str:
        rest, self._partial = self._partial, b""
        return utf_8_decode(rest, "replace", True)[0]


class SentencePieceStream:
    """Tokens are text or single bytes; a run of bytes that is no character becomes one U+FFFD per byte."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._run = b""

    def push(self, tokens: Iterable[int]) -> str:
        out: list[str] = []
        for token in tokens:
            piece = self._pieces[token]
            if isinstance(piece, bytes):
                out.append(self._push_byte(piece))
            elif piece:
                if self._run:
                    out.append(self.finish())
                out.append(piece)
        return "".join(out)

    def finish(self) -> str:
        rest, self._run = self._run, b""
        return _REPLACEMENT * len(rest)

    def _push_byte(self, byte: bytes) -> str:
        self._run += byte
        try:
            text, used = utf_8_decode(self._run, "strict", False)
        except UnicodeDecodeError:
            return self._restart(byte)
        self._run = self._run[used:]
        return text

    def _restart(self, byte: bytes) -> str:
        """The run cannot become a character any more; its last byte may begin another one."""
        broken = self._run[:-1]
        self._run = b""
        if not broken:
            return _REPLACEMENT
        return _REPLACEMENT * len(broken) + self._push_byte(byte)


class WholeTextStream:
    """For tokenizers that only decode whole texts: the last few tokens are decoded again with every new one."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._shown = 0  # how many of _tokens have been shown

    def push(self, tokens: Iterable[int]) -> str:
        return "".join([self._push_one(token) for token in tokens])

    def finish(self) -> str:
        text = self._unshown()
        self._tokens.clear()
        self._shown = 0
        return text

    def _push_one(self, token: int) -> str:
        self._tokens.append(token)
        text = self._unshown()
        incomplete = text.endswith(_REPLACEMENT) and len(self._tokens) - self._shown < _CONTEXT_TOKENS
        if not text or incomplete:
            return ""
        del self._tokens[:-_CONTEXT_TOKENS]
        self._shown = len(self._tokens)
        return text

    def _unshown(self) -> str:
        before = self._decode(self._tokens[: self._shown])
        return self._decode(self._tokens)[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip) if tokens else ""


class Detokenizer:
    """Makes the stream for each new sequence. Pieces are worked out once per tokenizer and shared by all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = {skip: tokenizer.pieces(skip) for skip in (False, True)}

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        pieces = self._pieces[skip_special_tokens]
        if pieces is None:
            return WholeTextStream(self._tokenizer, skip_special_tokens)
        if pieces.family is Family.BYTE_LEVEL:
            return ByteLevelStream(pieces)
        return SentencePieceStream(pieces)
