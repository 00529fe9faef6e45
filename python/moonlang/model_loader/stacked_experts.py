"""Checkpoints whose experts of a layer are one tensor, seen as if each matrix were a tensor of its own (gpt-oss).

Of a layer with `experts.NAME` in the model's map, the parts of NAME take turns: number j of an expert's outputs belongs
to part j % parts. Stored are

    experts.NAME                         [E, M, N], floats, transposed
    experts.NAME_blocks, NAME_scales     [E, N, ...], see `layers.quantization.mxfp4`
    experts.NAME_bias                    [E, N]

and seen are "experts.<i>.<part>.weight" [N / parts, M], and the biases with the parts one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moonlang.base.errors import ConfigError
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization import mxfp4
from moonlang.model_loader.weights import WeightSource, as_float

_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_BYTE = 2  # numbers in one


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix lies: expert `expert` of tensor `stack`, part `part` of `parts`."""

    stack: str
    expert: int
    part: int
    parts: int


class StackedExperts:
    """See WeightSource, whose methods these are."""

    def __init__(self, inner: WeightSource, stacked: Mapping[str, tuple[str, ...]]) -> None:
        """stacked: by NAME, its parts. ConfigError when blocks come without scales."""
        self._inner = inner
        self._places: dict[str, _Place] = {}
        self._biases: dict[str, int] = {}  # by name of what is no matrix, how many parts take turns
        self._names: dict[str, None] = {}
        stored = dict.fromkeys(inner.names())
        for name in stored:
            self._find(name, stored, stacked)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places.get(name)
        if place is None:
            return self._inner.shape(name)
        whole = self._inner.shape(place.stack)
        if place.stack.endswith(_BLOCKS):
            _, outputs, groups, width = whole
            return outputs // place.parts, groups * width * _BYTE
        _, inputs, outputs = whole
        return outputs // place.parts, inputs

    def dtype(self, name: str) -> str:
        place = self._places.get(name)
        if place is None:
            return self._inner.dtype(name)
        return "F32" if place.stack.endswith(_BLOCKS) else self._inner.dtype(place.stack)

    def tensor(self, name: str) -> Tensor:
        if name in self._places:
            return as_float(self.matrix(name))
        found, parts = self._inner.tensor(name), self._biases.get(name, 1)
        return found if parts == 1 else torch.cat([found[:, i::parts] for i in range(parts)], 1)

    def matrix(self, name: str) -> Tensor | QuantizedMatrix:
        place = self._places.get(name)
        if place is None:
            return self._inner.matrix(name)
        stack, turn = self._inner.tensor(place.stack)[place.expert], slice(place.part, None, place.parts)
        if not place.stack.endswith(_BLOCKS):
            return self._inner.wanted(name, stack[:, turn].T.contiguous())
        scales = self._inner.tensor(place.stack.removesuffix(_BLOCKS) + _SCALES)[place.expert]
        try:
            return mxfp4.matrix(stack[turn], scales[turn])
        except ValueError as error:
            raise ConfigError(f"{place.stack} is no MXFP4: {error}.", hint="Fetch the checkpoint again.") from error

    def is_optional(self, name: str) -> bool:
        return name not in self._places and self._inner.is_optional(name)

    def _find(self, name: str, stored: Mapping[str, None], stacked: Mapping[str, tuple[str, ...]]) -> None:
        layer, _, last = name.rpartition(".experts.")
        base = next((base for base in stacked if last.removeprefix(base) in ("", _BLOCKS, _SCALES, _BIAS)), None)
        if base is None or last == base + _BIAS:
            self._names[name] = None
            self._biases[name] = 1 if base is None else len(stacked[base])
            return
        if last == base + _SCALES:
            return  # they belong to the blocks
        if last == base + _BLOCKS and name.removesuffix(_BLOCKS) + _SCALES not in stored:
            raise ConfigError(f"{name} has no scales.", hint="Fetch the checkpoint again.")
        parts = stacked[base]
        for expert in range(self._inner.shape(name)[0]):
            for i, part in enumerate(parts):
                own = f"{layer}.experts.{expert}.{part}.weight"
                self._names[own] = None
                self._places[own] = _Place(name, expert, i, len(parts))
