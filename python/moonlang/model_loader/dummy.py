"""`--load-format dummy`: random weights without a checkpoint, the same for the same seed and the same names."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moonlang.config.model_config import ModelConfig
from moonlang.model_loader.parts import Source
from moonlang.model_loader.weights import quantized
from moonlang.models.spec import WeightsMap

_SPREAD = 0.02


def fill(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> None:
    """Norms get ones, everything else a normal distribution. Each parameter's numbers depend on its name only."""
    for name, parameter in model.named_parameters():
        parameter.copy_(_values(name, parameter, seed))


def _values(name: str, parameter: Tensor, seed: int) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(parameter.shape, device="cpu")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(0, _SPREAD, generator=generator)


def parts(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> Source:
    """The same numbers for a model without memory: each parameter is one tensor of its dtype."""
    shapes = dict(model.named_parameters())

    def tensors(name: str) -> list[Tensor]:
        return [_values(name, shapes[name], seed).to(shapes[name].dtype)]

    return Source(tensors, lambda name: [quantized(name, tensor, config.quantization) for tensor in tensors(name)])


BACKEND = fill
