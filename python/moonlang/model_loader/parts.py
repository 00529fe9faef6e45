"""The tensors of a model that has no memory for its parameters, for those who bring them into a form of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moonlang.kernels.matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Source:
    """By a parameter's name: `tensors` that make it up, one below the other, as floats; or, of a matrix that inputs are
    multiplied by, `matrices` in the form they are to be computed with. Of a parameter of experts, `expert` gives what
    one of them has, be it on this rank or not: matrices, or its row [N] of a bias [E, N]."""

    tensors: Callable[[str], Sequence[Tensor]]
    matrices: Callable[[str], Sequence[Tensor | QuantizedMatrix]]
    expert: Callable[[str, int], Sequence[Tensor | QuantizedMatrix]]


class Parts:
    """A `Source` by the parameters themselves."""

    def __init__(self, source: Source, names: Mapping[Tensor, str]) -> None:
        self._source = source
        self._names = names

    def __call__(self, parameter: Tensor) -> Sequence[Tensor]:
        return self._source.tensors(self._names[parameter])

    def matrices(self, parameter: Tensor) -> Sequence[Tensor | QuantizedMatrix]:
        return self._source.matrices(self._names[parameter])

    def expert(self, parameter: Tensor, number: int) -> Sequence[Tensor | QuantizedMatrix]:
        return self._source.expert(self._names[parameter], number)
