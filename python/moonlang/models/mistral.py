"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, pre_norm_decoder
from moonlang.models.spec import ModelSpec, WeightsMap

_WINDOW = 4096  # what a config.json that says nothing means; null means none


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """No biases; `sliding_window` tokens in sight, the token itself included."""
    spec = AttentionSpec(scale=config.head_dim**-0.5, window=config.hf.get("sliding_window", _WINDOW))
    attentions = [SelfAttention(config, layer, dtype, spec) for layer in range(config.num_layers)]
    return pre_norm_decoder(config, dtype, attentions)


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "sliding_window": 13,
        "tie_word_embeddings": False,
    }


SPEC = ModelSpec(
    architectures=("MistralForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, ignored=("rotary_emb.inv_freq",)),
)
