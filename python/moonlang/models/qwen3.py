"""Qwen 3, dense: q and k are normalised per head; otherwise Llama."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.layers.norm import RmsNorm
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, pre_norm_decoder
from moonlang.models.qwen2 import windows
from moonlang.models.spec import ModelSpec, WeightsMap


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    scale, bias = config.head_dim**-0.5, bool(config.hf.get("attention_bias", False))
    attentions = [
        SelfAttention(
            config,
            layer,
            dtype,
            AttentionSpec(scale=scale, window=window),
            qkv_bias=bias,
            out_bias=bias,
            norm=RmsNorm,
        )
        for layer, window in enumerate(windows(config))
    ]
    return pre_norm_decoder(config, dtype, attentions)


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


SPEC = ModelSpec(
    architectures=("Qwen3ForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, ignored=("rotary_emb.inv_freq",)),
)
