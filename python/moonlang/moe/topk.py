"""Gating: from the router's scores to the experts of each token and their weights.

Selection looks at the scores in float32 and ranks equal ones by expert id, so it is a function of the token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-20  # sigmoids may all be zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Gating:
    """How a router's scores become weights.

    sigmoid: scores are sigmoids instead of a softmax over all experts. normalise: the chosen weights are divided by
    their sum. scale: the weights are multiplied by it at the end.

    With groups > 1 (DeepSeek-V2 and V3) the experts form that many equal groups, and only the groups_kept best are
    chosen from. A group is as good as its best expert, or as the sum of its best two when there is a bias.
    """

    experts_per_token: int
    normalise: bool = False
    sigmoid: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1


def top_experts(logits: Tensor, gating: Gating, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits: [T, E] float32 -> weights [T, X] float32, experts [T, X] int64, best first.

    bias: [E] float32 or None is added to the scores for the choice, not for the weights.
    """
    scores = logits.sigmoid() if gating.sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if gating.groups > 1:
        choice = _in_best_groups(choice, gating, 1 if bias is None else 2)
    experts = _ranked(choice)[:, : gating.experts_per_token]
    weights = scores.gather(-1, experts)
    if gating.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return weights * gating.scale, experts


def _in_best_groups(choice: Tensor, gating: Gating, counted: int) -> Tensor:
    """choice: [T, E] -> the same, -inf outside a token's best groups. counted: experts that make a group good."""
    by_group = choice.unflatten(-1, (gating.groups, -1))
    good = by_group.topk(counted, -1).values.sum(-1)
    kept = _ranked(good)[:, : gating.groups_kept]
    outside = torch.ones_like(good, dtype=torch.bool).scatter_(-1, kept, False)
    return by_group.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def _ranked(values: Tensor) -> Tensor:
    """Indices of the last dimension, largest value first, equal ones by index."""
    return values.sort(stable=True, dim=-1, descending=True).indices
