"""Token ids to vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, Value


class Embedding(nn.Module):
    """weight: [V, M]. `scale` multiplies the vectors (Gemma), rounded to the weight's dtype first as its authors do."""

    def __init__(self, vocab: int, size: int, *, dtype: torch.dtype, scale: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, size, dtype=dtype), requires_grad=False)
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=dtype, device="cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [T] int64 -> [T, M]."""
        hidden = F.embedding(ids, self.weight)
        return hidden if self._scale is None else hidden * self._scale

    def lower(self, build: Builder) -> Value:
        """The same as a kernel call, over the input ids of the step."""
        return build.embed(self.weight, self._scale)
