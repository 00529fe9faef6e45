"""Reading a tokenizer's vocabulary for grammar engines, compared with what xgrammar makes of the same tokenizer."""

import json

import pytest
import xgrammar
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moonlang.constrained.vocabulary import read_vocabulary


def byte_level():
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_agrees_with_the_general_way(make, tmp_path):
    tokenizer = make()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size() + 7
    ours = read_vocabulary(str(tmp_path), size)
    assert ours is not None
    end = tokenizer.token_to_id("<end>")
    theirs = xgrammar.TokenizerInfo.from_huggingface(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer), vocab_size=size, stop_token_ids=[end]
    )
    same = xgrammar.TokenizerInfo(
        ours.tokens,
        xgrammar.VocabType[ours.encoding.upper()],
        vocab_size=size,
        stop_token_ids=[end],
        add_prefix_space=ours.prefix_space,
    )
    assert json.loads(same.dump_metadata()) == json.loads(theirs.dump_metadata())
    assert same.decoded_vocab == theirs.decoded_vocab


def test_other_tokenizers_are_left_to_the_general_way(tmp_path):
    assert read_vocabulary(str(tmp_path), 8) is None
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(str(tmp_path), 8) is None
