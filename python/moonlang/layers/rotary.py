"""Rotary position embedding (Su et al. 2021) with the scalings found in checkpoints.

Dimension pair (j, j + D/2) of a head is rotated by the angle position * inv_freq[j], inv_freq[j] = theta^(-2j/D).
The scalings change inv_freq: `linear` (Chen et al. 2023), `dynamic` (NTK-aware, by length), `yarn` (Peng et al. 2023)
and `llama3` (Llama 3.1). Cosines and sines are tables by position, so a token's rotation depends on nothing but its
position: not on the batch, the chunk, or what is cached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moonlang.base.errors import ConfigError

_DEFAULT_THETA = 10_000.0


def rope_parameters(hf: Mapping[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    """The rope settings of a config.json in one spelling: rope_type, rope_theta and the scaling's own fields.

    Reads `rope_parameters` (flat, or nested by layer type: `layer_type` picks one) and the older `rope_theta` +
    `rope_scaling`, where the type may be called `type`.
    """
    found = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if layer_type is not None and isinstance(found.get(layer_type), dict):
        found = dict(found[layer_type])
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    if found.get("rope_theta") is None:
        found["rope_theta"] = hf.get("rope_theta") or _DEFAULT_THETA
    original = hf.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    found["original_max_position_embeddings"] = original or hf["max_position_embeddings"]
    found["max_position_embeddings"] = hf["max_position_embeddings"]
    if (found.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(
            "Rotation of a part of each head is not supported here.", hint="Try --model-impl transformers."
        )
    return found


class Rotary:
    """cos and sin of every position below `length`, for heads of `dim` dimensions, in the model's dtype.

    The sines of the first half are stored negated, so that rotating is x * cos + swap_halves(x) * sin.
    """

    def __init__(self, parameters: Mapping[str, Any], dim: int, length: int, dtype: torch.dtype) -> None:
        """ConfigError for a scaling that is not known or lacks a field. The tables are made when first read."""
        self._recipe = parameters, dim, length
        self._dtype = dtype
        self._tables: tuple[Tensor, Tensor] | None = None
        with torch.device("cpu"):
            _cos_sin(parameters, dim, 1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [T] int64 -> cos, sin: [T, 1, D]. Once per forward; the layers share them."""
        if self._tables is None:
            cos, sin = self.table().to(positions.device, self._dtype).chunk(2, -1)
            self._tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        cos, sin = self._tables
        return cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)

    def table(self) -> Tensor:
        """[length, D] float32 on the CPU, rounded to the dtype: cosines of the first half of a head, then its sines."""
        with torch.device("cpu"):
            return torch.cat(_cos_sin(*self._recipe), -1).to(self._dtype).float()


def _cos_sin(parameters: Mapping[str, Any], dim: int, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin: [length, D/2] float32."""
    positions = torch.arange(length, dtype=torch.float32)[:, None]
    inv_freq, scale = inverse_frequencies(parameters, dim, positions)
    angles = positions * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, N, D] -> [T, N, D] rotated; cos and sin as given by `Rotary.at`."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((second, first), -1), sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same where neighbours, (2j, 2j + 1), are a pair: DeepSeek."""
    halves = rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)
    return halves.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def inverse_frequencies(parameters: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, float]:
    """inv_freq ([D/2], or [positions, D/2] when the scaling depends on the position) and a factor for cos and sin.

    positions: [length, 1] float32. ConfigError for a scaling that is not known or lacks a field.
    """
    kind = parameters["rope_type"]
    if kind not in _SCALINGS:
        raise ConfigError(
            f"Rope scaling {kind!r} is not supported (known: {', '.join(sorted(_SCALINGS))}).",
            hint="Try --model-impl transformers.",
        )
    try:
        return _SCALINGS[kind](parameters, dim, positions)
    except KeyError as missing:
        raise ConfigError(f"Rope scaling {kind!r} needs the field {missing} in config.json.") from missing


def _plain(theta: Tensor | float, dim: int) -> Tensor:
    """theta^(-2j/D) for j < D/2; theta may be [length, 1]."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _default(parameters: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, float]:
    return _plain(parameters["rope_theta"], dim), 1.0


def _linear(parameters: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, float]:
    return _plain(parameters["rope_theta"], dim) / parameters["factor"], 1.0


def _dynamic(parameters: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, float]:
    """Past the trained length N theta grows: at position t with the theta of a sequence of t + 1 tokens.

    This is what `transformers` does when it generates token by token. (Its prefill of more than N tokens uses the
    final length for all of them, which makes a token's key depend on the chunking; here it never does.)
    """
    factor, trained = parameters["factor"], parameters["max_position_embeddings"]
    length = (positions + 1).clamp(min=trained).double()
    theta = parameters["rope_theta"] * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    return _plain(theta.float(), dim), 1.0


def _llama3(parameters: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, trained = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    inv_freq = _plain(parameters["rope_theta"], dim)
    wavelength = 2 * math.pi / inv_freq
    smooth = (trained / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > trained / low, inv_freq / factor, between)
    return torch.where(wavelength < trained / high, inv_freq, scaled), 1.0


def _yarn(parameters: Mapping[str, Any], dim: int, positions: Tensor) -> tuple[Tensor, float]:
    """Interpolation for slow dimensions, none for fast ones, a ramp between; cos and sin grow with log(factor)."""
    trained, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]
    factor = parameters["factor"] or parameters["max_position_embeddings"] / trained

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times within the trained length."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = _plain(theta, dim)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), _yarn_scale(parameters, factor)


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return given

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(mscale) / grown(mscale_all) if mscale and mscale_all else grown(1.0)


_SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
