"""Quantised checkpoints, made here by the definition of their formats, against the float model they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import torch
from checkpoints import read_config, reference_model
from paged_driver import PagedDriver
from safetensors.torch import save_file
from torch import nn

from moonlang.base.errors import ConfigError
from moonlang.config.host import cpu_kernels
from moonlang.model_loader import fingerprint, load_model
from moonlang.models.registry import spec_for, specs

PROMPT = [(7 * i + 3) % 256 for i in range(40)]
TOLERANCE = 1e-4

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
COMPRESSED["config_groups"] = {"group_0": {"weights": {"type": "float", "num_bits": 8}, "input_activations": {}}}

FORMATS: dict[str, tuple[dict[str, Any], Callable[..., packers.Packed]]] = {
    "gptq4": (GPTQ, packers.gptq),
    "gptq4-asymmetric": (GPTQ | {"sym": False}, partial(packers.gptq, symmetric=False)),
    "gptq4-act-order": (GPTQ | {"desc_act": True}, partial(packers.gptq, act_order=True)),
    "gptq4-one-group": (GPTQ | {"group_size": -1}, partial(packers.gptq, group=-1)),
    "gptq4-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, partial(packers.gptq, symmetric=False, v2=True)),
    "gptq8": (GPTQ | {"bits": 8}, partial(packers.gptq, bits=8)),
    "gptq8-asymmetric": (GPTQ | {"bits": 8}, partial(packers.gptq, bits=8, symmetric=False, act_order=True)),
    "awq": (AWQ, packers.awq),
    "fp8-tensor": (FP8, packers.fp8),
    "fp8-block": (FP8 | {"weight_block_size": [128, 128]}, partial(packers.fp8, block=128, name="weight_scale_inv")),
    "fp8-channel": (COMPRESSED, partial(packers.fp8, channels=True)),
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A Llama whose matrices end within a block of 128, with two query heads per key head."""
    return specs()["llama"].tiny() | {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16} | changes


def write(folder: Path, config: dict[str, Any], settings: dict[str, Any] | None, pack: Any) -> nn.Module:
    """A checkpoint with the projections of every layer packed, and the float model with the same numbers."""
    model = reference_model(config)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            base, _, ending = name.rpartition(".")
            if pack is None or ending != "weight" or not base.endswith("_proj"):
                tensors[name] = value.clone()
                continue
            packed, exact = pack(value.numpy())
            tensors |= {f"{base}.{ending}": tensor for ending, tensor in packed.items()}
            value.copy_(torch.from_numpy(exact))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    written = config | {"torch_dtype": "float16"} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(written))
    return model


def logits_of(folder: Path, kernels: bool = False, **args: Any) -> tuple[list[int], torch.Tensor]:
    """The tokens and the log probabilities of all positions, from chunks of 16, by torch or the kernels."""
    config = read_config(folder, **args)
    spec = spec_for(config, "moonlang")
    if kernels:
        from program_driver import ProgramDriver  # imports sgl_kernel

        driver = ProgramDriver(config, spec, 8, 64)
    else:
        driver = PagedDriver(load_model(config, spec), spec.kv_schema(config, 8), 64)
    sequence = driver.sequence(PROMPT)
    driver.generate([sequence], 16, 6)
    return sequence.tokens, torch.stack(sequence.logits).log_softmax(-1)


def expect(model: nn.Module, tokens: list[int], logits: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance)
    assert tokens[len(PROMPT) :] == wanted[len(PROMPT) - 1 :].argmax(-1).tolist()


WITH_KERNELS = [False, pytest.param(True, marks=pytest.mark.skipif(not cpu_kernels(), reason="no sgl-kernel"))]


@pytest.mark.parametrize("kernels", WITH_KERNELS, ids=["torch", "kernels"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_checkpoint_is_the_float_model_it_stands_for(form: str, kernels: bool, tmp_path: Path) -> None:
    settings, pack = FORMATS[form]
    model = write(tmp_path, config_of(), settings, pack)
    expect(model, *logits_of(tmp_path, kernels))


def test_zero_biases_of_gptq_files_are_not_in_the_way(tmp_path: Path) -> None:
    def pack(weight: np.ndarray) -> packers.Packed:
        tensors, exact = packers.gptq(weight)
        return tensors | {"bias": torch.zeros(len(weight))}, exact

    model = write(tmp_path, config_of(attention_bias=False, mlp_bias=False), GPTQ, pack)
    expect(model, *logits_of(tmp_path))


def test_parts_of_a_fused_projection_may_stay_floats(tmp_path: Path) -> None:
    count = iter(range(1000))

    def pack(weight: np.ndarray) -> packers.Packed:
        return packers.fp8(weight) if next(count) % 2 else ({"weight": torch.from_numpy(weight.copy())}, weight)

    model = write(tmp_path, config_of(), FP8, pack)
    expect(model, *logits_of(tmp_path))


def test_experts(tmp_path: Path) -> None:
    config = specs()["qwen3_moe"].tiny()
    plain = reference_model(config)
    assert any("experts" in name for name in plain.state_dict())
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            base, _, ending = name.rpartition(".")
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                tensors |= pack_experts(name, value)
            elif base.endswith("_proj") and ending == "weight":
                packed, exact = packers.gptq(value.numpy())
                tensors |= {f"{base}.{part}": tensor for part, tensor in packed.items()}
                value.copy_(torch.from_numpy(exact))
            else:
                tensors[name] = value.clone()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    expect(plain, *logits_of(tmp_path))


def pack_experts(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """value: [E, F, M], all experts of a layer in one, as transformers keeps them; it takes on the packed numbers."""
    tensors: dict[str, torch.Tensor] = {}
    base, _, last = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    for expert, whole in enumerate(value):
        for part, matrix in zip(parts, whole.chunk(len(parts)), strict=True):
            packed, exact = packers.gptq(matrix.numpy())
            tensors |= {f"{base}.{expert}.{part}.{ending}": tensor for ending, tensor in packed.items()}
            matrix.copy_(torch.from_numpy(exact))
    return tensors


@pytest.mark.parametrize("kernels", WITH_KERNELS, ids=["torch", "kernels"])
@pytest.mark.parametrize(("method", "error"), [("int8", 0.08), ("fp8", 0.3), ("w8a8_int8", 0.12), ("int4", 0.9)])
def test_float_checkpoints_are_quantized_while_loading(
    method: str, error: float, kernels: bool, tmp_path: Path
) -> None:
    """error: the largest mean absolute difference of log probabilities; random weights are the worst case."""
    model = write(tmp_path, config_of(hidden_size=256, intermediate_size=320), None, None)
    tokens, logits = logits_of(tmp_path, kernels, quantization=method)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    difference = (logits - wanted).abs().mean()
    assert 1e-4 < difference < error


def test_pages_of_differently_quantized_weights_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, config_of(), None, None)
    names = {fingerprint(read_config(tmp_path, quantization=method)) for method in (None, "int8", "int4", "fp8")}
    assert len(names) == 4


def test_tensors_that_do_not_fit_their_format(tmp_path: Path) -> None:
    def pack(weight: np.ndarray) -> packers.Packed:
        tensors, exact = packers.gptq(weight)
        return tensors | {"g_idx": torch.zeros(weight.shape[1], dtype=torch.int32)}, exact

    write(tmp_path, config_of(), GPTQ, pack)
    with pytest.raises(ConfigError, match=r"no gptq matrix: g_idx"):
        logits_of(tmp_path)
