"""The feed-forward blocks of mixture-of-experts models, and the decoder around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moonlang.config.model_config import ModelConfig
from moonlang.config.shard import WHOLE
from moonlang.layers.linear import Linear, project
from moonlang.models.blocks import FeedForward, GatedMlp
from moonlang.moe.experts import Experts
from moonlang.moe.topk import Gating, top_experts

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, Value

FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class SparseMlp(FeedForward):
    """A router, experts, and for some models an expert that every token visits (`shared`: its inner size).

    The shared expert's output is scaled by the sigmoid of a projection of its own, as in Qwen2-MoE. Ranks
    share the experts; router and shared expert are in all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        gating: Gating,
        *,
        experts: int,
        inner: int,
        act: str,
        shared: int | None = None,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.gating = gating
        self.gate = Linear(size, experts, bias=False, dtype=dtype)
        self.experts = Experts(experts, size, inner, act=act, dtype=dtype, shard=config.shard)
        self.shared_expert = GatedMlp(config, dtype, act=act, inner=shared, shard=WHOLE) if shared else None
        self.shared_expert_gate = Linear(size, 1, bias=False, dtype=dtype) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, M] -> [T, M]. The router's scores are computed in float32: rounded ones would often be equal."""
        scores = project(x.float(), self.gate.weight.float())
        weights, experts = top_experts(scores, self.gating)
        out = self.experts(x, weights, experts)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return out
        return out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    def lower(self, build: Builder, x: Value, residual: Value | None = None) -> Value:
        """forward(x) (+ residual) as kernel calls."""
        shared = self.shared_expert
        return build.experts(
            x,
            router=self.gate.weight,
            gate_up=self.experts.gate_up_proj,
            down=self.experts.down_proj,
            act=self.experts.act,
            gating=asdict(self.gating),
            shared=None if shared is None else (shared.gate_up_proj.weight, shared.down_proj.weight),
            shared_gate=None if self.shared_expert_gate is None else self.shared_expert_gate.weight,
            residual=residual,
        )


def sparse_layers(config: ModelConfig) -> Sequence[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, except those in `mlp_only_layers` (Qwen)."""
    step, dense = config.hf.get("decoder_sparse_step", 1), config.hf.get("mlp_only_layers") or ()
    return [(layer + 1) % step == 0 and layer not in dense for layer in range(config.num_layers)]


def expert_count(config: ModelConfig, default: int) -> int:
    """The number of experts: `num_experts`, which transformers 5 writes as `num_local_experts`."""
    return config.hf.get("num_experts") or config.hf.get("num_local_experts") or default
