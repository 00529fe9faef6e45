"""Gating against its definition, written with loops."""

from __future__ import annotations

import pytest
import torch

from moonlang.moe.topk import Gating, top_experts

GATINGS = [
    Gating(experts_per_token=3),
    Gating(experts_per_token=4, normalise=True),
    Gating(experts_per_token=2, sigmoid=True, normalise=True, scale=2.5),
    Gating(experts_per_token=5, sigmoid=True, groups=4, groups_kept=2, scale=1.5),
    Gating(experts_per_token=12),
]


def by_hand(logits: list[float], gating: Gating, bias: list[float] | None) -> tuple[list[float], list[int]]:
    row = torch.tensor(logits)
    scores = (row.sigmoid() if gating.sigmoid else row.softmax(-1)).tolist()
    choice = [score + (bias[i] if bias else 0.0) for i, score in enumerate(scores)]
    members = len(choice) // gating.groups
    groups = [choice[i * members : (i + 1) * members] for i in range(gating.groups)]
    goodness = [sum(sorted(group, reverse=True)[: 2 if bias else 1]) for group in groups]
    kept = sorted(range(gating.groups), key=lambda g: (-goodness[g], g))[: gating.groups_kept]
    allowed = [i for i in range(len(choice)) if i // members in kept]
    experts = sorted(allowed, key=lambda i: (-choice[i], i))[: gating.experts_per_token]
    weights = [scores[i] for i in experts]
    total = sum(weights) if gating.normalise else 1.0
    return [weight / total * gating.scale for weight in weights], experts


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_same_as_by_hand(gating: Gating, biased: bool) -> None:
    torch.manual_seed(3)
    logits, bias = torch.randn(40, 12) * 2, torch.randn(12) * 0.2 if biased else None
    weights, experts = top_experts(logits, gating, bias)
    for row in range(len(logits)):
        expected, chosen = by_hand(logits[row].tolist(), gating, None if bias is None else bias.tolist())
        assert experts[row].tolist() == chosen
        assert weights[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_scores_go_to_the_lower_ids() -> None:
    _, experts = top_experts(torch.zeros(2, 8), Gating(experts_per_token=3))
    assert experts.tolist() == [[0, 1, 2]] * 2
