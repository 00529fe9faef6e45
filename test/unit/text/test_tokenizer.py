"""Our tokenizer agrees with transformers on the same files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from moonlang.base.errors import ConfigError
from moonlang.text.tokenizer import FastTokenizer, TransformersTokenizer, load_tokenizer

TEXTS = ["Hello world", "  two spaces ", "你好 🙂", "a<s>b</s>c", "<tool>call</tool>", "", "\n\n\t"]


@pytest.fixture(scope="module")
def folders(
    byte_level_folder: Path, sentence_piece_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The two families, and byte-level ones whose config speaks about begin and end tokens."""
    found = {"byte_level": byte_level_folder, "sentence_piece": sentence_piece_folder}
    for name, extra in {
        "ignored_flag": {"add_bos_token": True},
        "llama": {"add_bos_token": True, "add_eos_token": True, "tokenizer_class": "LlamaTokenizerFast"},
        "more_tokens": {"added_tokens_decoder": {"900": {"content": "<new>", "special": True}}},
    }.items():
        found[name] = changed(byte_level_folder, tmp_path_factory.mktemp(name), extra)
    return found


def changed(source: Path, target: Path, extra: dict[str, Any]) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return target


NAMES = ["byte_level", "sentence_piece", "ignored_flag", "more_tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_same_ids_and_texts_as_transformers(folders: dict[str, Path], name: str) -> None:
    own = FastTokenizer(folders[name])
    reference = TransformersTokenizer(folders[name], trust_remote_code=False, use_fast=True)
    assert (own.vocab_size, own.bos_id, own.eos_id) == (reference.vocab_size, reference.bos_id, reference.eos_id)
    assert own.special_tokens == reference.special_tokens
    for text in TEXTS:
        for special in (True, False):
            assert own.encode(text, special) == reference.encode(text, special), (text, special)
    rng = random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(own.vocab_size) for _ in range(30)]
        for skip in (True, False):
            assert own.decode(ids, skip) == reference.decode(ids, skip)
    for token in (0, 5, own.vocab_size - 1, own.vocab_size, -1):
        assert own.id_to_token(token) == reference.id_to_token(token) if token >= 0 else True
    assert own.token_to_id("</s>") == reference.token_to_id("</s>") == own.eos_id
    assert own.token_to_id("no such token") is None


def test_bos_is_added_once_by_config(folders: dict[str, Path]) -> None:
    """transformers 5 forgets these flags beside a tokenizer.json; checkpoints of these classes count on them."""
    tokenizer = FastTokenizer(folders["llama"])
    ids = tokenizer.encode("Hello")
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.encode("Hello", add_special_tokens=False) == ids[1:-1]


def test_long_texts_take_another_way_to_the_same_ids(folders: dict[str, Path]) -> None:
    tokenizer = FastTokenizer(folders["byte_level"])
    text = "Hello world, 你好!\n" * 400
    half = text[: len(text) // 2]
    assert len(text) > 4096
    assert tokenizer.encode(text) == tokenizer.encode(half) + tokenizer.encode(half, add_special_tokens=False)


def test_without_a_tokenizer_json_transformers_loads(byte_level_folder: Path, tmp_path: Path) -> None:
    model = json.loads((byte_level_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, TransformersTokenizer)
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"
    assert tokenizer.id_to_token(10**9) is None


def test_an_empty_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[1]")])
def test_broken_files_are_config_errors(byte_level_folder: Path, tmp_path: Path, file: str, content: str) -> None:
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=file):
        load_tokenizer(str(tmp_path))
