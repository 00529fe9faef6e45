"""Qwen 3, mixture of experts: the attention of Qwen 3, and experts in place of the feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.layers.norm import RmsNorm
from moonlang.models.blocks import FUSED, Decoder, GatedMlp, SelfAttention, pre_norm_decoder
from moonlang.models.sparse_blocks import FUSED_EXPERTS, SparseMlp, expert_count, sparse_layers
from moonlang.models.spec import ModelSpec, WeightsMap
from moonlang.moe.topk import Gating


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    hf = config.hf
    act, bias = hf.get("hidden_act", "silu"), bool(hf.get("attention_bias", False))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    spec = AttentionSpec(scale=config.head_dim**-0.5, window=window)
    attentions = [
        SelfAttention(config, layer, dtype, spec, qkv_bias=bias, out_bias=bias, norm=RmsNorm)
        for layer in range(config.num_layers)
    ]
    gating = Gating(experts_per_token=hf.get("num_experts_per_tok", 8), normalise=bool(hf.get("norm_topk_prob", False)))
    experts, inner = expert_count(config, 128), hf.get("moe_intermediate_size", 768)
    mlps = [
        SparseMlp(config, dtype, gating, experts=experts, inner=inner, act=act)
        if sparse
        else GatedMlp(config, dtype, act=act)
        for sparse in sparse_layers(config)
    ]
    return pre_norm_decoder(config, dtype, attentions, mlps)


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


SPEC = ModelSpec(
    architectures=("Qwen3MoeForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, experts=FUSED_EXPERTS, ignored=("rotary_emb.inv_freq",)),
)
