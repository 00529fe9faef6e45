"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, pre_norm_decoder
from moonlang.models.sparse_blocks import SparseMlp, expert_count
from moonlang.models.spec import ModelSpec, WeightsMap
from moonlang.moe.topk import Gating


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    hf, layers = config.hf, range(config.num_layers)
    spec = AttentionSpec(scale=config.head_dim**-0.5, window=hf.get("sliding_window"))
    gating = Gating(experts_per_token=hf.get("num_experts_per_tok", 2), normalise=True)
    experts, inner = expert_count(config, 8), hf["intermediate_size"]
    act = hf.get("hidden_act", "silu")
    mlps = [SparseMlp(config, dtype, gating, experts=experts, inner=inner, act=act) for _ in layers]
    return pre_norm_decoder(config, dtype, [SelfAttention(config, layer, dtype, spec) for layer in layers], mlps)


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 512,
        "sliding_window": 21,
        "tie_word_embeddings": False,
    }


SPEC = ModelSpec(
    architectures=("MixtralForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(
        fused=FUSED,
        experts={"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
        renamed=((".block_sparse_moe.", ".mlp."),),
        ignored=("rotary_emb.inv_freq",),
    ),
)
