"""Activations by the names of config.json."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from moonlang.base.errors import ConfigError
from moonlang.layers.activation import activation


@pytest.mark.parametrize("name", ["silu", "swish", "relu", "gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_same_function_as_in_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 500)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


def test_unknown() -> None:
    with pytest.raises(ConfigError, match=r"'swirl'.*Known: gelu"):
        activation("swirl")
