"""Gemma 2: every other layer sees a window, scores and logits are capped, norms stand on both sides of each block."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.layers.rotary import Rotary, rope_parameters
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, sandwich_decoder
from moonlang.models.spec import ModelSpec, WeightsMap


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    hf = config.hf
    bias = bool(hf.get("attention_bias", False))
    scale = hf.get("query_pre_attn_scalar", 256) ** -0.5
    softcap = hf.get("attn_logit_softcapping", 50.0)
    attentions = [
        SelfAttention(
            config,
            layer,
            dtype,
            AttentionSpec(scale=scale, window=window, softcap=softcap),
            qkv_bias=bias,
            out_bias=bias,
        )
        for layer, window in enumerate(_windows(config))
    ]
    rotary = Rotary(rope_parameters(hf), config.head_dim, config.context_length, dtype)
    return sandwich_decoder(
        config, dtype, attentions, [rotary], [0] * config.num_layers, hf.get("final_logit_softcapping", 30.0)
    )


def _windows(config: ModelConfig) -> list[int | None]:
    """Even layers slide, unless `layer_types` says otherwise."""
    kinds = config.hf.get("layer_types") or [
        ("sliding_attention", "full_attention")[i % 2] for i in range(config.num_layers)
    ]
    return [config.hf.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds]


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "query_pre_attn_scalar": 24,
        "sliding_window": 13,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    }


SPEC = ModelSpec(
    architectures=("Gemma2ForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, plus_one=("norm.weight",)),
)
