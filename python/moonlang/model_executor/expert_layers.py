"""Layers of experts whose weights can be replaced between two steps, on both paths: see `moe.eplb.ExpertLayer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moonlang.model_loader import LoadExpert
from moonlang.moe.eplb import Put
from moonlang.moe.experts import Experts
from moonlang.moe.placement import Placement

if TYPE_CHECKING:
    from moonlang.kernels.expert_weights import BuiltExperts


class ProgramExperts:
    """Of a program. What a slot no longer holds is given up when nothing else holds it."""

    def __init__(self, built: BuiltExperts, rank: int) -> None:
        self.placement = Placement(tuple(tuple(held) for held in built.placement.slots))
        self._built = built
        self._rank = rank
        self._held = list(built.held)
        built.held.clear()  # what is no longer held shall go

    def take_counts(self) -> Tensor:
        return torch.tensor(self._built.layer.take_counts())

    def prepare(self, placement: Placement) -> Put:
        from sgl_kernel.cache import Unkept

        from moonlang.kernels.expert_weights import native

        here = dict(zip(self.placement.slots[self._rank], self._held, strict=True))
        weights, packing = self._built.weights, Unkept()
        for expert in placement.slots[self._rank]:
            if expert not in here:
                here[expert] = weights.packed(expert, packing)
        held = [here[expert] for expert in placement.slots[self._rank]]
        placed = native(placement)

        def put() -> None:
            self._built.layer.hold(placed, [up for up, _ in held], [down for _, down in held])
            self.placement, self._held = placement, held

        return put


class TorchExperts:
    """Of a model of torch: new weights are copied over the old ones."""

    def __init__(self, experts: Experts, name: str, load: LoadExpert) -> None:
        """name: of the module in the model that `load` knows."""
        self._experts = experts
        self._name = name
        self._load = load

    @property
    def placement(self) -> Placement:
        return self._experts.placement

    def take_counts(self) -> Tensor:
        found = self._experts.counts.cpu().clone()
        self._experts.counts.zero_()
        return found

    def prepare(self, placement: Placement) -> Put:
        experts = self._experts
        before, after = experts.held, placement.slots[experts.rank]
        changed = [slot for slot, expert in enumerate(after) if slot >= len(before) or before[slot] != expert]
        names = [name for name, _ in experts.named_parameters(recurse=False)]
        device = experts.gate_up_proj.device
        loaded = {
            name: [self._load(f"{self._name}.{name}", after[slot]).to(device) for slot in changed] for name in names
        }

        @torch.inference_mode()
        def put() -> None:
            for name, tensors in loaded.items():
                _replace(experts, name, len(after), changed, tensors)
            experts.placement = placement

        return put


def _replace(experts: Experts, name: str, slots: int, changed: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Parameter `name` of that many slots, with `tensors` in those that have changed."""
    parameter = experts.get_parameter(name)
    if slots != len(parameter):
        kept = min(slots, len(parameter))
        grown = torch.empty(slots, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device)
        grown[:kept] = parameter[:kept]
        parameter.data = grown
    for slot, tensor in zip(changed, tensors, strict=True):
        parameter[slot].copy_(tensor)
