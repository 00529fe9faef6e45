"""Text token by token equals text at once, and no half character is ever shown."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from moonlang.text.detokenize import Detokenizer, SentencePieceStream, TextStream, WholeTextStream
from moonlang.text.tokenizer import FastTokenizer

TEXTS = ["Hello world", " Hello  two spaces", "你好世界 🙂🚀", "naïve café\n\n    return {'a': 1}", "привет", "a", ""]


@pytest.fixture(scope="module")
def byte_level(byte_level_folder: Path) -> FastTokenizer:
    return FastTokenizer(byte_level_folder)


@pytest.fixture(scope="module")
def sentence_piece(sentence_piece_folder: Path) -> FastTokenizer:
    return FastTokenizer(sentence_piece_folder)


def run(stream: TextStream, ids: Sequence[int], rng: random.Random | None = None) -> str:
    """Feed `ids` one by one, or in random pieces; no output before the end may show a broken character early."""
    parts, at = [], 0
    while at < len(ids):
        size = 1 if rng is None else rng.randint(1, 5)
        parts.append(stream.push(ids[at : at + size]))
        at += size
    return "".join(parts) + stream.finish()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_byte_level_equals_whole_decode_on_random_tokens(byte_level: FastTokenizer, skip: bool, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(byte_level.vocab_size) for _ in range(200)]
    expected = byte_level.decode(ids, skip)
    detokenizer = Detokenizer(byte_level)
    assert run(detokenizer.stream(skip), ids) == expected
    assert run(detokenizer.stream(skip), ids, rng) == expected


def continuation(tokenizer: FastTokenizer, ids: Sequence[int], skip: bool = True) -> str:
    """The text of `ids` behind another text, whose own decoding is known."""
    anchor = tokenizer.encode("T", add_special_tokens=False)
    assert tokenizer.decode(anchor) == "T"
    return tokenizer.decode([*anchor, *ids], skip)[1:]


@pytest.mark.parametrize("seed", range(20))
def test_sentence_piece_equals_whole_decode_as_a_continuation(sentence_piece: FastTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    whole = [token for token in range(sentence_piece.vocab_size) if not is_byte(sentence_piece, token)]
    ids: list[int] = []
    for _ in range(40):
        ids += sentence_piece.encode(rng.choice(TEXTS), add_special_tokens=False)
        ids += rng.sample(whole, 5)
    for skip in (True, False):
        expected = continuation(sentence_piece, ids, skip)
        assert run(Detokenizer(sentence_piece).stream(skip), ids) == expected
        assert run(Detokenizer(sentence_piece).stream(skip), ids, rng) == expected


def is_byte(tokenizer: FastTokenizer, token: int) -> bool:
    text = tokenizer.id_to_token(token)
    return text is not None and text.startswith("<0x")


def test_sentence_piece_texts_come_back(sentence_piece: FastTokenizer) -> None:
    for text in TEXTS:
        ids = sentence_piece.encode(text, add_special_tokens=False)
        got = run(Detokenizer(sentence_piece).stream(), ids)
        assert got == (
            " " + text if text else ""
        )  # the space that the encoder put in front is kept: this is a continuation


@pytest.mark.parametrize("text", ["你好", "🙂", "é🚀x"])
def test_no_replacement_character_before_a_character_is_complete(
    byte_level: FastTokenizer, sentence_piece: FastTokenizer, text: str
) -> None:
    for tokenizer in (byte_level, sentence_piece):
        bytes_only = [tokenizer.encode(text, add_special_tokens=False)]
        stream = Detokenizer(tokenizer).stream()
        shown = [stream.push((token,)) for ids in bytes_only for token in ids]
        assert "\ufffd" not in "".join(shown)
        assert "".join(shown).endswith(text)
        assert stream.finish() == ""


def byte_ids(tokenizer: FastTokenizer, raw: bytes) -> list[int]:
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in raw]
    assert None not in ids
    return ids  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("你".encode()[:2], "\ufffd\ufffd"),
        (b"\xff", "\ufffd"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"\xe4" + "é".encode(), "\ufffdé"),
        (b"\xe4\xe4\xbd\xa0", "\ufffd你"),
        ("你".encode(), "你"),
    ],
)
def test_bytes_that_are_no_character(sentence_piece: FastTokenizer, raw: bytes, text: str) -> None:
    ids = byte_ids(sentence_piece, raw)
    assert run(Detokenizer(sentence_piece).stream(), ids) == text
    follower = sentence_piece.encode("T", add_special_tokens=False)
    stream = Detokenizer(sentence_piece).stream()
    assert stream.push(ids) + stream.push(follower) == text + " T"


def test_ids_outside_the_vocabulary_stand_for_nothing(byte_level: FastTokenizer, sentence_piece: FastTokenizer) -> None:
    for tokenizer in (byte_level, sentence_piece):
        stream = Detokenizer(tokenizer).stream()
        assert stream.push((10**6, -1, tokenizer.vocab_size)) == ""


def test_the_same_pieces_serve_all_sequences(sentence_piece: FastTokenizer) -> None:
    detokenizer = Detokenizer(sentence_piece)
    first, second = detokenizer.stream(), detokenizer.stream()
    assert isinstance(first, SentencePieceStream)
    half, rest = byte_ids(sentence_piece, "你".encode())[:2], byte_ids(sentence_piece, "你".encode())[2:]
    assert first.push(half) == ""
    assert second.push(byte_ids(sentence_piece, b"A")) == "A"
    assert first.push(rest) == "你"


@pytest.mark.parametrize("seed", range(10))
def test_a_tokenizer_of_another_family_is_decoded_by_whole_texts(byte_level: FastTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    opaque = SimpleNamespace(decode=byte_level.decode, pieces=lambda skip: None)
    stream = Detokenizer(opaque).stream()  # type: ignore[arg-type]
    assert isinstance(stream, WholeTextStream)
    ids = [token for _ in range(20) for token in byte_level.encode(rng.choice(TEXTS))]
    assert run(stream, ids) == byte_level.decode(ids)
