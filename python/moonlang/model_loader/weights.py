"""A checkpoint's tensors under plain float names, whatever form they are stored in or are to be computed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from moonlang.base import registry
from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.config.quantization import Quantization
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization.scheme import Scheme
from moonlang.model_loader.checkpoint import Checkpoint

_CHUNK = 4 << 20  # weights quantised at a time
_WEIGHT = ".weight"
_STORED_CODES = ("F8_E4M3", "F8_E5M2", "I8")  # of a tensor "NAME.weight" that holds no numbers but codes
_HEADS = ("lm_head.weight", "embed_tokens.weight")  # the second where it serves as the first
_KEPT = (
    ".gate.weight",
    ".router.weight",
    "shared_expert_gate.weight",
)  # routers are small, and their scores are compared


def open_weights(config: ModelConfig) -> WeightSource:
    """The weights in the folder of `config`. ConfigError when they cannot be read."""
    return WeightSource(Checkpoint(config.path), config.quantization)


def quantized(name: str, weight: Tensor, settings: Quantization | None) -> Tensor | QuantizedMatrix:
    """The matrix `name`, [N, K] float, in the form --quantization asks for: unchanged if none.

    The head becomes int8 (fp8 with fp8) whatever the rest becomes: it is a quarter of a small model, and it decides.
    """
    if settings is None or settings.in_checkpoint or name.endswith(_KEPT) or weight.ndim != 2:
        return weight
    method = "int8" if settings.method != "fp8" and name.endswith(_HEADS) else settings.method
    make = _scheme(method).make
    if make is None:
        raise ConfigError(f"Weights cannot be turned into {method}.", hint="Serve a checkpoint of that form.")
    rows = max(1, _CHUNK // weight.shape[1])
    return _stacked([make(part) for part in weight.split(rows)])


def _stacked(parts: list[QuantizedMatrix]) -> QuantizedMatrix:
    """Rows are quantised by themselves, so a matrix is made in pieces: the floats of a whole one take much memory."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return dataclasses.replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def as_float(matrix: Tensor | QuantizedMatrix) -> Tensor:
    """The numbers a matrix stands for: [N, K]."""
    return matrix.dequantized() if isinstance(matrix, QuantizedMatrix) else matrix


class WeightSource:
    """Tensors by name, as a model without quantisation has them.

    A quantised matrix is seen as one float tensor "NAME.weight"; the tensors it is stored in are not seen.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Quantization | None) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        stored = settings is not None and settings.in_checkpoint
        self._scheme = _scheme(settings.method) if settings is not None and stored else None
        self._names: dict[str, None] = {}
        self._tensors_of: dict[str, dict[str, str]] = {}  # quantised matrix -> {ending: name in the checkpoint}
        self._zero_biases: set[str] = set()
        if self._scheme is None:
            self._names = dict.fromkeys(checkpoint.names())
        else:
            self._find_quantized(self._scheme, dict.fromkeys(checkpoint.names()))

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._tensors_of.get(name)
        if found is None or self._scheme is None or self._scheme.shape is None:
            return self._checkpoint.shape(name)
        return self._scheme.shape({ending: self._checkpoint.shape(stored) for ending, stored in found.items()})

    def dtype(self, name: str) -> str:
        """As safetensors spells it: "BF16"; that of a quantised matrix is "F32"."""
        return "F32" if name in self._tensors_of else self._checkpoint.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """As floats; what needs no conversion is mapped memory: never write to it."""
        return as_float(self._stored(name)) if name in self._tensors_of else self._checkpoint.tensor(name)

    def matrix(self, name: str) -> Tensor | QuantizedMatrix:
        """A weight [N, K] in the form it is to be computed with: as stored, or as --quantization wants it."""
        if name in self._tensors_of:
            return self._stored(name)
        return self.wanted(name, self._checkpoint.tensor(name))

    def wanted(self, name: str, weight: Tensor) -> Tensor | QuantizedMatrix:
        """The matrix `name`, [N, K] float, as --quantization wants it."""
        return quantized(name, weight, self._settings)

    def is_optional(self, name: str) -> bool:
        """GPTQ files come with biases of zeros for layers that have none."""
        if name not in self._zero_biases:
            return False
        return not self._checkpoint.tensor(name).any()

    def _stored(self, name: str) -> QuantizedMatrix:
        scheme, settings, found = self._scheme, self._settings, self._tensors_of[name]
        assert scheme is not None
        assert scheme.read is not None
        assert settings is not None
        try:
            return scheme.read({e: self._checkpoint.tensor(stored) for e, stored in found.items()}, settings)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{name} is no {settings.method} matrix: {error}.", hint="Fetch or make the checkpoint again."
            ) from error

    def _find_quantized(self, scheme: Scheme, stored: Mapping[str, None]) -> None:
        """Sort the checkpoint's tensors into quantised matrices and the rest."""
        endings = (scheme.codes, *scheme.beside)
        for name in stored:
            base, _, ending = name.rpartition(".")
            if ending == scheme.codes and self._holds_codes(name):
                self._tensors_of[base + _WEIGHT] = {e: f"{base}.{e}" for e in endings if f"{base}.{e}" in stored}
        parts = {part for found in self._tensors_of.values() for part in found.values()}
        for name in stored:
            base, _, ending = name.rpartition(".")
            if name not in parts and ending not in scheme.ignored:
                self._names[name] = None
            if ending == "bias" and base + _WEIGHT in self._tensors_of:
                self._zero_biases.add(name)
        self._names |= dict.fromkeys(self._tensors_of)

    def _holds_codes(self, name: str) -> bool:
        return not name.endswith(_WEIGHT) or self._checkpoint.dtype(name) in _STORED_CODES


def _scheme(method: str) -> Scheme:
    return registry.find("layers.quantization", method).BACKEND
