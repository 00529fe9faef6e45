"""Experts with biases and an activation whose inputs are bounded: gpt-oss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moonlang.config.shard import WHOLE, Shard
from moonlang.layers.linear import project
from moonlang.moe.experts import Experts


@dataclass(frozen=True, slots=True)
class Bounds:
    """(up + 1) * gate * sigmoid(alpha * gate), with the gate at most `limit` and up within it on both sides."""

    alpha: float
    limit: float


class BoundedExperts(Experts):
    """As Experts, with gate_up_proj_bias [S, 2F] and down_proj_bias [S, M]."""

    def __init__(
        self,
        count: int,
        size: int,
        inner: int,
        *,
        bounds: Bounds,
        dtype: torch.dtype,
        shard: Shard = WHOLE,
        redundant: int = 0,
        slots_of: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(
            count, size, inner, act="silu", dtype=dtype, shard=shard, redundant=redundant, slots_of=slots_of
        )
        slots = len(self.held)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(slots, 2 * inner, dtype=dtype), requires_grad=False)
        self.down_proj_bias = nn.Parameter(torch.empty(slots, size, dtype=dtype), requires_grad=False)
        self.bounds = bounds

    def _one(self, slot: int, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_up_proj[slot], self.gate_up_proj_bias[slot]).chunk(2, -1)
        gate, up = gate.clamp(max=self.bounds.limit), up.clamp(-self.bounds.limit, self.bounds.limit)
        inner = (up + 1) * (gate * torch.sigmoid(gate * self.bounds.alpha))
        return project(inner, self.down_proj[slot], self.down_proj_bias[slot])
