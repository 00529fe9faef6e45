"""`--load-format dummy`: random weights without a checkpoint, the same for the same seed and the same names."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from moonlang.config.model_config import ModelConfig
from moonlang.models.spec import WeightsMap

_SPREAD = 0.02


def fill(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> None:
    """Norms get ones, everything else a normal distribution. Each parameter's numbers depend on its name only."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(
            0, _SPREAD, generator=generator
        )
        parameter.copy_(values)


BACKEND = fill
