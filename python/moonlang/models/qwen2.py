"""Qwen 2 and 2.5: Llama with biases on q, k and v, and on request a sliding window in the upper layers."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, pre_norm_decoder
from moonlang.models.spec import ModelSpec, WeightsMap


def windows(config: ModelConfig) -> list[int | None]:
    """The window of each layer: none unless `use_sliding_window`; then as `layer_types` or `max_window_layers` say."""
    hf, count = config.hf, config.num_layers
    if not hf.get("use_sliding_window", False):
        return [None] * count
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return [hf.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds]


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    scale = config.head_dim**-0.5
    attentions = [
        SelfAttention(config, layer, dtype, AttentionSpec(scale=scale, window=window), qkv_bias=True)
        for layer, window in enumerate(windows(config))
    ]
    return pre_norm_decoder(config, dtype, attentions)


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 512,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    }


SPEC = ModelSpec(
    architectures=("Qwen2ForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, ignored=("rotary_emb.inv_freq",)),
)
