"""`--load-format dummy`: random weights without a checkpoint, the same for the same seed and the same names."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

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
        within = cuts.get(name, ())
        tensors = _cut(_values(name, parameter, seed, within), within)
        parameter.copy_(torch.cat(tensors, within[0].axis) if within else tensors[0])


def _values(name: str, parameter: Tensor, seed: int, cuts: Cuts) -> list[Tensor]:
    """What one process would have: as many tensors as there are cuts."""
    if name.endswith("norm.weight"):
        return [torch.ones(parameter.shape, device="cpu")]
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    shape = list(parameter.shape)
    if cuts:
        shape[cuts[0].axis] = sum(cut.whole for cut in cuts)
    whole = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0, _SPREAD, generator=generator)
    return list(whole.split([cut.whole for cut in cuts], cuts[0].axis)) if cuts else [whole]


def _cut(tensors: list[Any], cuts: Cuts) -> list[Any]:
    """A rank's part."""
    return [cut.of(tensor) for tensor, cut in zip(tensors, cuts, strict=True)] if cuts else tensors


def parts(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> Source:
    """The same numbers for a model without memory."""
    shapes, cuts = dict(model.named_parameters()), cuts_of(model)

    def whole(name: str) -> list[Tensor]:
        found = _values(name, shapes[name], seed, cuts.get(name, ()))
        return [tensor.to(shapes[name].dtype) for tensor in found]

    def matrices(name: str) -> list[Any]:
        return _cut([quantized(name, tensor, config.quantization) for tensor in whole(name)], cuts.get(name, ()))

    @lru_cache(maxsize=1)
    def experts(name: str) -> Tensor:
        return whole(name)[0]

    return Source(lambda name: _cut(whole(name), cuts.get(name, ())), matrices, lambda name, i: [experts(name)[i]])


BACKEND = fill
