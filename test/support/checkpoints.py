"""Random checkpoints for tests: a config.json and safetensors in a folder, with or without their transformers model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moonlang.config.model_config import ModelConfig, load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.model_loader import load_model
from moonlang.models.registry import spec_for
from moonlang.models.spec import ModelSpec


def reference_model(config: dict[str, Any]) -> nn.Module:
    """The transformers model that `config`, a config.json, describes: float32, random in every parameter."""
    fields = copy.deepcopy({key: value for key, value in config.items() if key not in ("architectures", "model_type")})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms begin as ones and biases as zeros: give all of them a part to play
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    return model


def write_checkpoint(folder: Path, config: dict[str, Any], **save: Any) -> nn.Module:
    """Save `reference_model(config)` in `folder` and return it. config.json is `config` itself, in its own spelling."""
    model = reference_model(config)
    model.save_pretrained(folder, **save)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return model


def read_config(folder: Path, dtype: str = "float32", **args: Any) -> ModelConfig:
    return load_model_config(str(folder), ServerArgs.create(model_path=str(folder), dtype=dtype, **args))


def load(folder: Path, dtype: str = "float32", load_format: str = "auto") -> tuple[nn.Module, ModelSpec, ModelConfig]:
    """The same checkpoint as a model of ours."""
    config = read_config(folder, dtype)
    spec = spec_for(config, "moonlang")
    return load_model(config, spec, load_format), spec, config
