"""Attention sinks: one learned score per head, of a key that has no value. It takes a share of the attention."""

from __future__ import annotations

import torch
from torch import nn

from moonlang.layers.cut import Cuts


class Sinks(nn.Module):
    """weight: [heads of this rank]. cuts: see `layers.linear.Projection`."""

    bias = None

    def __init__(self, heads: int, dtype: torch.dtype, cuts: Cuts = ()) -> None:
        super().__init__()
        self.cuts = cuts
        self.weight = nn.Parameter(torch.empty(heads, dtype=dtype), requires_grad=False)
