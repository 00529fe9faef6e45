"""Activations of the gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from moonlang.base.errors import ConfigError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that config.json calls `name`. ConfigError for one that is not known."""
    if name not in _ACTIVATIONS:
        raise ConfigError(f"Activation {name!r} is not supported.", hint=f"Known: {', '.join(sorted(_ACTIVATIONS))}.")
    return _ACTIVATIONS[name]
