"""What a file of this package offers: reading matrices from a checkpoint, making them from floats, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moonlang.config.quantization import Quantization
from moonlang.kernels.matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """codes: the ending of the tensor that makes a matrix "NAME.weight" a quantised one; beside: endings of the tensors
    that belong to it, of which a checkpoint may lack some; ignored: endings that are not needed at all.

    read({ending: tensor}, settings): the matrix; ValueError with the reason when the tensors make none.
    shape({ending: shape}): its (N, K).
    make(weight [N, K] float): the nearest matrix of this form; None when only checkpoints have it.
    """

    codes: str = "weight"
    beside: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Tensor], Quantization], QuantizedMatrix] | None = None
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, int]] | None = None
    make: Callable[[Tensor], QuantizedMatrix] | None = None
