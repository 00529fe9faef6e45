"""Qwen 1.5 and 2, mixture of experts: the attention of Qwen 2, experts, and one more expert for every token."""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.config.model_config import ModelConfig
from moonlang.models.blocks import FUSED, Decoder, GatedMlp, SelfAttention, pre_norm_decoder
from moonlang.models.sparse_blocks import FUSED_EXPERTS, SparseMlp, expert_count, sparse_layers
from moonlang.models.spec import ModelSpec, WeightsMap
from moonlang.moe.topk import Gating


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    hf = config.hf
    act, bias = hf.get("hidden_act", "silu"), bool(hf.get("qkv_bias", True))
    scale = config.head_dim**-0.5
    attentions = [
        SelfAttention(config, layer, dtype, AttentionSpec(scale=scale, window=window), qkv_bias=bias)
        for layer, window in enumerate(_windows(config))
    ]
    gating = Gating(experts_per_token=hf.get("num_experts_per_tok", 4), normalise=bool(hf.get("norm_topk_prob", False)))
    experts, inner = expert_count(config, 60), hf.get("moe_intermediate_size", 1408)
    shared = hf.get("shared_expert_intermediate_size", 5632)
    mlps = [
        SparseMlp(config, dtype, gating, experts=experts, inner=inner, act=act, shared=shared)
        if sparse
        else GatedMlp(config, dtype, act=act)
        for sparse in sparse_layers(config)
    ]
    return pre_norm_decoder(config, dtype, attentions, mlps)


def _windows(config: ModelConfig) -> list[int | None]:
    """None unless `use_sliding_window`; then even layers below `max_window_layers`, or as `layer_types` says."""
    hf, count = config.hf, config.num_layers
    if not hf.get("use_sliding_window", False):
        return [None] * count
    last = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(count)
    ]
    return [hf.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds]


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 512,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 3,
        "tie_word_embeddings": False,
    }


SPEC = ModelSpec(
    architectures=("Qwen2MoeForCausalLM",),
    build=build,
    tiny=tiny,
    weights=WeightsMap(fused=FUSED, experts=FUSED_EXPERTS, ignored=("rotary_emb.inv_freq",)),
)
