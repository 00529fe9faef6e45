"""The experts of a layer as the kernels take them: which are where, and their weights, one expert at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import sgl_kernel
from sgl_kernel.cache import PackedWeights
from sgl_kernel.exchange import Placement as NativePlacement
from sgl_kernel.program import PackedWeight
from torch import Tensor

from moonlang.kernels.packing import pack

_OWN = 1  # chunk of an arena in which every weight has memory of its own, which goes with it


class Placed(Protocol):
    """`moonlang.moe.placement.Placement`; hashable."""

    @property
    def slots(self) -> Sequence[Sequence[int]]: ...

    def all_copies(self) -> Sequence[Sequence[tuple[int, int]]]: ...


@lru_cache(maxsize=512)
def native(placement: Placed) -> NativePlacement:
    """The same for the kernels. Layers that have not been balanced have one in common."""
    return NativePlacement.of(placement.all_copies(), [len(held) for held in placement.slots])


@dataclass(frozen=True, slots=True)
class Packed:
    """The weights of a program, for another one of the same model with other experts. dense: in the order in which they
    are asked for. experts: by layer, gate_up and down by the number of the expert."""

    dense: list[PackedWeight] = field(default_factory=list)
    experts: list[dict[int, tuple[PackedWeight, PackedWeight]]] = field(default_factory=list)


class ExpertParts(Protocol):
    """See model_loader.parts."""

    def expert(self, parameter: Tensor, number: int) -> Sequence[Any]:
        """What makes up one expert of a parameter [E, N, K]; or its row of a bias [E, N]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Packs any expert of a layer.

    gate_up: [E, 2F, M], down: [E, M, F]. kind: "f32" or "bf16", of what is not quantised. biases, bounds: see
    Builder.experts. apart: every weight in memory of its own, so that it can be given up alone.
    """

    parts: ExpertParts
    gate_up: Tensor
    down: Tensor
    kind: str
    biases: tuple[Tensor, Tensor] | None = None
    bounds: tuple[float, float] | None = None
    apart: bool = False

    def packed(self, expert: int, by: PackedWeights) -> tuple[PackedWeight, PackedWeight]:
        """Its gate_up and down."""
        up, down = self._one(by, self.gate_up, expert, gated=True), self._one(by, self.down, expert)
        if self.biases is not None:
            up, down = (
                weight.with_bias(self.parts.expert(bias, expert)[0].float().contiguous())
                for weight, bias in zip((up, down), self.biases, strict=True)
            )
        return (up if self.bounds is None else up.with_bounds(*self.bounds)), down

    def _one(self, by: PackedWeights, parameter: Tensor, expert: int, *, gated: bool = False) -> PackedWeight:
        """The parts are not asked for when it has been packed before: they may have to be quantised first."""

        def packed(arena: Any) -> PackedWeight:
            chosen = sgl_kernel.arena(_OWN) if self.apart else arena
            return pack(self.parts.expert(parameter, expert), kind=self.kind, gated=gated, arena=chosen)

        return by.weight(packed)


@dataclass(frozen=True, slots=True)
class BuiltExperts:
    """A layer of a program: what runs it, where all experts were at first, and what it held of them, by slot."""

    layer: Any
    placement: Placed
    weights: ExpertWeights
    held: list[tuple[PackedWeight, PackedWeight]]
