"""gpt-oss: experts with biases and a bounded activation, attention with sinks, every other layer with a window."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.layers.norm import GemmaRmsNorm
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, pre_norm_decoder
from moonlang.models.sparse_blocks import FUSED_EXPERTS, SparseMlp, expert_count
from moonlang.models.spec import ModelSpec, WeightsMap
from moonlang.moe.bounded_experts import Bounds
from moonlang.moe.topk import Gating


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The authors take the softmax over the chosen experts, which is that over all, divided by the sum of the chosen.
    Their norms multiply in float32, as Gemma's do."""
    hf = config.hf
    bias = bool(hf.get("attention_bias", True))
    attentions = [
        SelfAttention(
            config,
            layer,
            dtype,
            AttentionSpec(scale=config.head_dim**-0.5, window=window),
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
        )
        for layer, window in enumerate(_windows(config))
    ]
    gating = Gating(experts_per_token=hf.get("num_experts_per_tok", 4), normalise=True)
    bounds = Bounds(float(hf.get("swiglu_alpha", 1.702)), float(hf.get("swiglu_limit", 7.0)))
    count, inner = expert_count(config, 128), hf["intermediate_size"]
    mlps = [SparseMlp(config, dtype, gating, experts=count, inner=inner, bounds=bounds) for _ in attentions]
    return pre_norm_decoder(config, dtype, attentions, mlps, norm=GemmaRmsNorm)


def _windows(config: ModelConfig) -> list[int | None]:
    """As `layer_types` says; else the first layer has a window, and every other one after it."""
    hf, count = config.hf, config.num_layers
    kinds = hf.get("layer_types") or [("sliding_attention", "full_attention")[layer % 2] for layer in range(count)]
    return [hf.get("sliding_window", 128) if kind == "sliding_attention" else None for kind in kinds]


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "swiglu_limit": 1.0,
        "sliding_window": 21,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
        "max_position_embeddings": 512,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }


SPEC = ModelSpec(
    architectures=("GptOssForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(
        fused=FUSED,
        experts=FUSED_EXPERTS,
        stacked=FUSED_EXPERTS,
        renamed=((".mlp.router.", ".mlp.gate."), (".self_attn.sinks", ".self_attn.sinks.weight")),
        ignored=("rotary_emb.inv_freq",),
    ),
)
