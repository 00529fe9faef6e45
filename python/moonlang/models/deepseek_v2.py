"""DeepSeek-V2, V2-Lite and V2.5: latent attention, and many small experts of which some see every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.models.blocks import FUSED, Decoder, FeedForward, GatedMlp, pre_norm_decoder
from moonlang.models.latent_attention import LatentAttention, latent_rotary
from moonlang.models.sparse_blocks import FUSED_EXPERTS, SparseMlp, expert_count
from moonlang.models.spec import ModelSpec, WeightsMap
from moonlang.moe.topk import Gating


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The choice of experts is a plain one (`greedy`), or one among those of the best groups."""
    hf = config.hf
    method = hf.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"topk_method {method!r} is not known.", hint="Known: greedy, group_limited_greedy.")
    grouped = method == "group_limited_greedy"
    gating = Gating(
        experts_per_token=hf.get("num_experts_per_tok") or 6,
        normalise=bool(hf.get("norm_topk_prob", False)),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        groups=(hf.get("n_group") or 1) if grouped else 1,
        groups_kept=(hf.get("topk_group") or 1) if grouped else 1,
    )
    return latent_decoder(config, dtype, sparse_mlps(config, dtype, gating, corrected=False))


def sparse_mlps(config: ModelConfig, dtype: torch.dtype, gating: Gating, *, corrected: bool) -> list[FeedForward]:
    """The feed-forward layers: dense ones first, then experts. corrected: see SparseMlp."""
    hf = config.hf
    act, inner = hf.get("hidden_act", "silu"), hf.get("moe_intermediate_size", 1408)
    shared = inner * (hf.get("n_shared_experts") or 0)
    first, step = hf.get("first_k_dense_replace") or 0, hf.get("moe_layer_freq") or 1
    return [
        SparseMlp(
            config,
            dtype,
            gating,
            experts=expert_count(config, 64),
            inner=inner,
            act=act,
            shared=shared or None,
            shared_gate=False,
            corrected=corrected,
        )
        if layer >= first and layer % step == 0
        else GatedMlp(config, dtype, act=act)
        for layer in range(config.num_layers)
    ]


def latent_decoder(config: ModelConfig, dtype: torch.dtype, mlps: Sequence[FeedForward]) -> Decoder:
    """The whole of a DeepSeek around its feed-forward layers."""
    attentions = [LatentAttention(config, layer, dtype) for layer in range(config.num_layers)]
    return pre_norm_decoder(config, dtype, attentions, mlps, latent_rotary(config))


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }


WEIGHTS = WeightsMap(
    fused=FUSED,
    experts=FUSED_EXPERTS,
    renamed=((".shared_experts.", ".shared_expert."), (".gate.e_score_correction_bias", ".choice_bias")),
    ignored=("rotary_emb.inv_freq",),
    layers="model.layers.",
)

SPEC = ModelSpec(architectures=("DeepseekV2ForCausalLM",), build=build, tiny=tiny, weights=WEIGHTS)
