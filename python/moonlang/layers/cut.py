"""Which part of a checkpoint's tensor a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moonlang.kernels.matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows (axis 0) or columns (axis 1) of a tensor that has `whole` of them. part: a tuple when they are scattered."""

    axis: int
    part: range | tuple[int, ...]
    whole: int

    def of(self, tensor: Tensor | QuantizedMatrix) -> Tensor | QuantizedMatrix:
        """A view, of what can be one."""
        if isinstance(self.part, tuple):
            if isinstance(tensor, QuantizedMatrix):
                raise TypeError("Scattered rows of a quantised matrix are not wanted anywhere.")
            return tensor.index_select(self.axis, torch.tensor(self.part, device=tensor.device))
        if isinstance(tensor, QuantizedMatrix):
            return tensor.rows(self.part) if self.axis == 0 else tensor.columns(self.part)
        return tensor.narrow(self.axis, self.part.start, len(self.part))

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part of a tensor of shape `whole`; unchanged, and so wrong, when that is not what is to be cut."""
        if self.axis >= len(whole) or whole[self.axis] != self.whole:
            return whole
        return (*whole[: self.axis], len(self.part), *whole[self.axis + 1 :])


Cuts = Sequence[Cut]  # of the tensors that make up a parameter, in order; none: it holds them whole


def rows(part: range, whole: int, each: int = 1) -> Cut:
    """Of `whole` things with `each` rows."""
    return Cut(0, range(part.start * each, part.stop * each), whole * each)
