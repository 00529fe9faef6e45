"""The feed-forward blocks of mixture-of-experts models, and the decoder around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moonlang.config.model_config import ModelConfig
from moonlang.config.shard import WHOLE
from moonlang.layers.linear import Linear, project
from moonlang.models.blocks import FeedForward, GatedMlp
from moonlang.moe.bounded_experts import BoundedExperts, Bounds
from moonlang.moe.experts import Experts
from moonlang.moe.topk import Gating, top_experts

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, Value

FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class SparseMlp(FeedForward):
    """A router, experts, and for some models an expert that every token visits (`shared`: its inner size).

    The shared expert's output is scaled by the sigmoid of a projection of its own if `shared_gate`, as in Qwen2-MoE.
    corrected: `choice_bias` is added to the scores for the choice of experts, but not for their weights, as in
    DeepSeek-V3. bounds: router and experts have biases, and the experts an activation of their own, as in gpt-oss.
    Ranks share the experts; router and shared expert are in all of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        gating: Gating,
        *,
        experts: int,
        inner: int,
        act: str = "silu",
        shared: int | None = None,
        shared_gate: bool = True,
        corrected: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        shard, redundant, slots_of = config.expert_shard, config.copied_experts, config.expert_slots
        self.gating = gating
        self.gate = Linear(size, experts, bias=bounds is not None, dtype=dtype)
        bias = torch.empty(experts, dtype=torch.float32) if corrected else None
        self.choice_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if bounds is None:
            self.experts = Experts(
                experts, size, inner, act=act, dtype=dtype, shard=shard, redundant=redundant, slots_of=slots_of
            )
        else:
            self.experts = BoundedExperts(
                experts,
                size,
                inner,
                bounds=bounds,
                dtype=dtype,
                shard=shard,
                redundant=redundant,
                slots_of=slots_of,
            )
        self.shared_expert = GatedMlp(config, dtype, act=act, inner=shared, shard=WHOLE) if shared else None
        gated = shared and shared_gate
        self.shared_expert_gate = Linear(size, 1, bias=False, dtype=dtype) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, M] -> [T, M]. The router's scores are computed in float32: rounded ones would often be equal."""
        bias = None if self.gate.bias is None else self.gate.bias.float()
        scores = project(x.float(), self.gate.weight.float(), bias)
        weights, experts = top_experts(scores, self.gating, self.choice_bias)
        out = self.experts(x, weights, experts)
        if self.shared_expert is None:
            return out
        if self.shared_expert_gate is None:
            return out + self.shared_expert(x)
        return out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    def lower(self, build: Builder, x: Value, residual: Value | None = None) -> Value:
        """forward(x) (+ residual) as kernel calls."""
        shared, experts = self.shared_expert, self.experts
        bounded = experts if isinstance(experts, BoundedExperts) else None
        return build.experts(
            x,
            router=self.gate.weight,
            router_bias=self.gate.bias,
            choice_bias=self.choice_bias,
            gate_up=experts.gate_up_proj,
            down=experts.down_proj,
            placement=experts.placement,
            held=experts.held,
            act=experts.act,
            biases=bounded and (bounded.gate_up_proj_bias, bounded.down_proj_bias),
            bounds=bounded and (bounded.bounds.alpha, bounded.bounds.limit),
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
    """The number of experts per layer, `default` where config.json leaves it out."""
    return config.num_experts or default
