"""Root-mean-square normalisation: x / sqrt(mean(x^2) + eps) * w, over the last dimension.

Half precision is where implementations differ, so the rounding follows the model's authors: Llama-like models round the
normalised value to the model's dtype and then multiply, Gemma multiplies in float32 by (1 + w) and rounds once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, NormWeight


class RmsNorm(nn.Module):
    """The Llama form. weight: [size]."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self._shape = (size,)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size], same shape and dtype out."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self._shape, self.weight, self._eps)
        return F.rms_norm(x, self._shape, None, self._eps) * self.weight

    def lowered(self, build: Builder) -> NormWeight:
        """What the kernels need to know of this norm."""
        return build.norm_weight(self.weight, self._eps, form="llama")


class GemmaRmsNorm(nn.Module):
    """The Gemma form: the checkpoint stores w, the layer keeps 1 + w in float32 (the weights map adds the one)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)
        self._shape = (size,)
        self._eps = eps
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size], same shape and dtype out."""
        return F.rms_norm(x.float(), self._shape, self.weight, self._eps).to(self._dtype)

    def lowered(self, build: Builder) -> NormWeight:
        """What the kernels need to know of this norm."""
        return build.norm_weight(self.weight, self._eps, form="gemma")
