"""Hidden states to scores over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from moonlang.layers.linear import project


def logits(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """hidden: [N, M], weight: [V, M] (the embedding when they are tied) -> [N, V] float32.

    softcap c bounds the scores to (-c, c): c * tanh(x / c), computed in the weight's dtype as Gemma 2 does.
    """
    scores = project(hidden, weight)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.float()
