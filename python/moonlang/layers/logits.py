"""Hidden states to scores over the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moonlang.config.shard import Shard
from moonlang.distributed.group import Group
from moonlang.layers.linear import project


def logits(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """hidden: [N, M], weight: [V, M] (the embedding when they are tied) -> [N, V] float32.

    softcap c bounds the scores to (-c, c): c * tanh(x / c), computed in the weight's dtype as Gemma 2 does.
    """
    scores = project(hidden, weight)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores.float()


def gathered(share: Tensor, group: Group, vocabulary: int) -> Tensor:
    """share: [N, this rank's part of V] -> [N, V]."""
    widths = [len(Shard(rank, group.size).part(vocabulary)) for rank in range(group.size)]
    found = group.all_gather(F.pad(share, (0, max(widths) - share.shape[1])))
    return torch.cat([part[:, :width] for part, width in zip(found, widths, strict=True)], 1)
