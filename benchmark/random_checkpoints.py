"""Random-weight checkpoints for benchmarks: real architectures, real tokenizers, no meaning."""

from __future__ import annotations

import glob
import sysconfig
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # engine overhead: four small layers
    "L4": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    # engine overhead: next to no model at all
    "T": {
        "vocab_size": 16384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # a small Llama
    "S": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # Qwen3-0.6B
    "M": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    # a small mixture of experts
    "E": {
        "model_type": "qwen3_moe",
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
}
_TOKENIZER_WORDS = 16384  # at most: training a larger one takes minutes, and the prompts are token ids
_CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def make(name: str, folder: Path) -> Path:
    """The checkpoint `name` (a key of SHAPES) in bfloat16 under `folder`; kept from an earlier call if it is there."""
    path = folder / name
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-6, **SHAPES[name]}
    _tokenizer(min(shape["vocab_size"], _TOKENIZER_WORDS)).save_pretrained(path)
    torch.manual_seed(1234)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def weight_bytes(path: Path) -> int:
    """Of a checkpoint on disk."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def kv_bytes(name: str) -> int:
    """Keys and values of one token, in bfloat16."""
    shape = SHAPES[name]
    head_dim = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    return shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head_dim * 2


def _tokenizer(vocab_size: int) -> Any:
    """Byte-level BPE trained on Python's own library, which lies on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(sorted(glob.glob(f"{sysconfig.get_paths()['stdlib']}/*.py")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=_CHAT
    )
