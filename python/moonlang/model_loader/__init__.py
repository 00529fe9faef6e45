"""Making a model with its weights. One file per `--load-format`; `auto` means safetensors."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from moonlang.base import registry
from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.model_loader.fingerprint import fingerprint
from moonlang.model_loader.parts import Parts
from moonlang.model_loader.weights import as_float
from moonlang.models.spec import CausalModel, ModelSpec, torch_dtype

__all__ = ["LoadExpert", "expert_loader", "fingerprint", "load_model", "open_model"]

LoadExpert = Callable[[str, int], Tensor]
"""(parameter of experts, number of any expert) -> what that one has of it, in the parameter's dtype, on the CPU."""


def load_model(
    config: ModelConfig, spec: ModelSpec, load_format: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> CausalModel:
    """The model that `spec` builds for `config`, on `device`, in dtype config.dtype, ready for inference.

    seed: of the random weights of load format `dummy`. ConfigError when the checkpoint is incomplete or does not fit.
    """
    device = torch.device(device)
    if spec.load is not None and config.quantization is not None:
        raise ConfigError(
            f"{', '.join(config.architectures)} has no own model file, and only those read quantized weights.",
            hint="Serve an unquantized checkpoint without --quantization.",
        )
    ranks = max(config.shard.size, config.expert_shard.size, config.stage.size)
    if spec.load is not None and ranks > 1:
        raise ConfigError(
            f"{', '.join(config.architectures)} has no own model file, and only those can be shared by ranks.",
            hint="Leave out --tp-size and --pp-size.",
        )
    if spec.load is not None:
        return spec.load(config, load_format, device)
    backend = _backend(load_format).BACKEND
    with torch.device(device):
        model = spec.build(config, torch_dtype(config.dtype))
    with torch.no_grad():
        backend(model, spec.weights, config, seed)
    return model.eval()


def open_model(
    config: ModelConfig, spec: ModelSpec, load_format: str = "auto", seed: int = 0
) -> tuple[CausalModel, Parts]:
    """The model without memory for its parameters, and the tensors that make them up.

    For those who bring the weights into a form of their own. Errors as in `load_model`; not for a model whose spec
    loads it.
    """
    backend = _backend(load_format)
    with torch.device("meta"):
        model = spec.build(config, torch_dtype(config.dtype)).eval()
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return model, Parts(backend.parts(model, spec.weights, config, seed), names)


def expert_loader(
    model: CausalModel, config: ModelConfig, spec: ModelSpec, load_format: str = "auto", seed: int = 0
) -> LoadExpert:
    """For experts that come to this rank when `model` has long been loaded. Keeps the checkpoint open."""
    parts = _backend(load_format).parts(model, spec.weights, config, seed)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def load(name: str, expert: int) -> Tensor:
        found = [as_float(part) for part in parts.expert(name, expert)]
        return torch.cat(found).to(dtypes[name])

    return load


def _backend(load_format: str) -> ModuleType:
    return registry.find("model_loader", "safetensors" if load_format == "auto" else load_format)
