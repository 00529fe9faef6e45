"""Small tokenizers of the two great families, written as a checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, hello again!",
    "Ünïcödé, naïve café, 你好世界, привет мир, 🙂🚀 emoji and more text.",
    "def main():\n    return {'key': [1, 2, 3]}\n",
]


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Llama 3 or Qwen: byte-level BPE, special tokens, added tokens that are not special."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("é plus space", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"bos_token": "<s>", "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def sentence_piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Llama 2: BPE over text with U+2581 for spaces, and a token for every byte."""
    folder = tmp_path_factory.mktemp("sentence_piece")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special[:3], limit_alphabet=60)
    tokenizer.train_from_iterator([text.replace(" ", "\u2581") for text in CORPUS[:1] * 20], trainer)
    model = json.loads(tokenizer.to_str())
    vocab = model["model"]["vocab"]
    for token in special[3:]:
        vocab[token] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(model))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
