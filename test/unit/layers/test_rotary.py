"""Reading rope settings, and rotating by them. That the scalings are right is seen in test/model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moonlang.base.errors import ConfigError
from moonlang.layers.rotary import Rotary, rope_parameters, rotate

PLAIN = {"max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "kind", "theta"),
    [
        ({}, "default", 10000.0),
        ({"rope_theta": 5e5}, "default", 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, "default", 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, "linear", 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "linear", 5e5),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0, "factor": 2}}, "yarn", 7.0),
        ({"rope_parameters": {"rope_theta": 7.0}}, "default", 7.0),
    ],
)
def test_old_and_new_spelling(config: dict[str, Any], kind: str, theta: float) -> None:
    parameters = rope_parameters({"max_position_embeddings": 128} | config)
    assert (parameters["rope_type"], parameters["rope_theta"]) == (kind, theta)
    assert parameters["original_max_position_embeddings"] == 128


def test_nested_by_layer_type() -> None:
    nested = {
        "full_attention": {"rope_theta": 1.0, "rope_type": "linear", "factor": 2},
        "sliding_attention": {"rope_theta": 2.0},
    }
    config = {"max_position_embeddings": 128, "rope_parameters": nested}
    assert rope_parameters(config, "full_attention")["rope_type"] == "linear"
    assert rope_parameters(config, "sliding_attention")["rope_theta"] == 2.0


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3"} | {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "part of each head"),
    ],
)
def test_what_cannot_be_served_is_said(scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Rotary(rope_parameters(PLAIN | {"rope_scaling": scaling}), 16, 128, torch.float32)


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}, LLAMA3 | {"rope_type": "llama3"}])
def test_a_rotation_depends_on_the_position_only(scaling: dict[str, Any] | None) -> None:
    """Bit for bit, whatever else is in the batch and however long the table is: cached keys stay valid."""
    parameters = rope_parameters(PLAIN | {"rope_scaling": scaling})
    short, long = (Rotary(parameters, 16, length, torch.float32) for length in (200, 999))
    x = torch.randn(200, 3, 16)
    whole = rotate(x, *long.at(torch.arange(200)))
    for position in (0, 1, 127, 128, 199):
        alone = rotate(x[position : position + 1], *short.at(torch.tensor([position])))
        assert torch.equal(alone[0], whole[position])


def test_scores_depend_on_the_distance() -> None:
    rotary = Rotary(rope_parameters(PLAIN), 32, 128, torch.float32)
    q, k = torch.randn(1, 1, 32).expand(100, 1, 32), torch.randn(1, 1, 32).expand(100, 1, 32)
    cos, sin = rotary.at(torch.arange(100))
    scores = torch.einsum("ihd,jhd->ij", rotate(q, cos, sin), rotate(k, cos, sin))
    torch.testing.assert_close(scores[10:, 10:], scores[:-10, :-10], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0], scores[10])
