"""`--load-format dummy`: random weights without a checkpoint, the same for the same seed and the same names."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moonlang.config.model_config import ModelConfig
from moonlang.layers.cut import Cuts
from moonlang.model_loader.cuts import cuts_of
from moonlang.model_loader.parts import Source
from moonlang.model_loader.weights import quantized
from moonlang.models.spec import WeightsMap

_SPREAD = 0.02


def fill(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> None:
    """Norms get ones, everything else a normal distribution. Each parameter's numbers depend on its name only."""
    cuts = cuts_of(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(_values(name, parameter, seed, cuts.get(name, ())))


def _values(name: str, parameter: Tensor, seed: int, cuts: Cuts) -> Tensor:
    """A rank's part of what one process would have."""
    if name.endswith("norm.weight"):
        return torch.ones(parameter.shape, device="cpu")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    shape = list(parameter.shape)
    if cuts:
        shape[cuts[0].axis] = sum(cut.whole for cut in cuts)
    whole = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0, _SPREAD, generator=generator)
    if not cuts:
        return whole
    tensors = whole.split([cut.whole for cut in cuts], cuts[0].axis)
    return torch.cat([cut.of(tensor) for tensor, cut in zip(tensors, cuts, strict=True)], cuts[0].axis)


def parts(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> Source:
    """The same numbers for a model without memory: each parameter is one tensor of its dtype."""
    shapes, cuts = dict(model.named_parameters()), cuts_of(model)

    def tensors(name: str) -> list[Tensor]:
        return [_values(name, shapes[name], seed, cuts.get(name, ())).to(shapes[name].dtype)]

    return Source(tensors, lambda name: [quantized(name, tensor, config.quantization) for tensor in tensors(name)])


BACKEND = fill
