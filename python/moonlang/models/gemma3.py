"""Gemma 3, text: five layers in six slide and have their own rope base, q and k are normalised, no score is capped.

A multimodal checkpoint (Gemma3ForConditionalGeneration) is served without its eyes: the vision tensors are not loaded.
"""

from __future__ import annotations

from typing import Any

import torch

from moonlang.attention.batch import AttentionSpec
from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.layers.norm import GemmaRmsNorm
from moonlang.layers.rotary import Rotary, rope_parameters
from moonlang.models.blocks import FUSED, Decoder, SelfAttention, sandwich_decoder
from moonlang.models.spec import ModelSpec, WeightsMap

_KINDS = ("full_attention", "sliding_attention")
_THETAS = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


def build(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    hf = config.hf
    if hf.get("use_bidirectional_attention"):
        raise ConfigError("This Gemma 3 attends in both directions: it is an encoder and cannot generate.")
    bias = bool(hf.get("attention_bias", False))
    scale = hf.get("query_pre_attn_scalar", 256) ** -0.5
    windows = {"full_attention": None, "sliding_attention": hf.get("sliding_window", 4096)}
    kinds = _layer_kinds(config)
    attentions = [
        SelfAttention(
            config,
            layer,
            dtype,
            AttentionSpec(scale=scale, window=windows[kind]),
            qkv_bias=bias,
            out_bias=bias,
            norm=GemmaRmsNorm,
        )
        for layer, kind in enumerate(kinds)
    ]
    rotaries = [Rotary(_rope(hf, kind), config.head_dim, config.context_length, dtype) for kind in _KINDS]
    used = [_KINDS.index(kind) for kind in kinds]
    return sandwich_decoder(config, dtype, attentions, rotaries, used, hf.get("final_logit_softcapping"))


def _layer_kinds(config: ModelConfig) -> list[str]:
    """Every `sliding_window_pattern`-th layer sees everything, unless `layer_types` says otherwise."""
    every = config.hf.get("sliding_window_pattern") or 6
    return config.hf.get("layer_types") or [_KINDS[(i + 1) % every != 0] for i in range(config.num_layers)]


def _rope(hf: dict[str, Any], kind: str) -> dict[str, Any]:
    """New files nest `rope_parameters` by kind of layer; older ones scale the full layers only and name two bases."""
    if hf.get("rope_parameters"):
        nested = (hf["rope_parameters"].get(kind) or {}) | {}
        return rope_parameters({"rope_theta": _THETAS[kind]} | hf | {"rope_scaling": None, "rope_parameters": nested})
    if kind == "full_attention":
        return rope_parameters({"rope_theta": _THETAS[kind]} | hf)
    theta = hf.get("rope_local_base_freq") or _THETAS[kind]
    return rope_parameters(hf | {"rope_theta": theta, "rope_scaling": None})


def tiny() -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 512,
        "query_pre_attn_scalar": 24,
        "sliding_window": 13,
        "sliding_window_pattern": 3,
    }


SPEC = ModelSpec(
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    build=build,
    tiny=tiny,
    weights=WeightsMap(
        fused=FUSED,
        plus_one=("norm.weight",),
        prefixes=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ),
)
