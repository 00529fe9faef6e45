"""Llama 1 to 3, and the many models published under its architecture."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, pre_norm_decoder
from moonlang.models.spec import ModelSpec, WeightsMap


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Biases on the projections as `attention_bias` and `mlp_bias` say; every layer sees everything before it."""
    bias = bool(config.hf.get("attention_bias", False))
    spec = AttentionSpec(scale=config.head_dim**-0.5)
    attentions = [
        SelfAttention(config, layer, dtype, spec, qkv_bias=bias, out_bias=bias) for layer in range(config.num_layers)
    ]
    return pre_norm_decoder(config, dtype, attentions)


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }


SPEC = ModelSpec(
    architectures=("LlamaForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, ignored=("rotary_emb.inv_freq",)),
)
