"""Quantised tensors made by the definition of their formats, word by word with plain numpy: slow, and nobody's code.

Every packer returns the tensors of one matrix, by ending, and the float32 matrix that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import reference_model
from safetensors.torch import save_file
from torch import Tensor, nn

Packed = tuple[dict[str, Tensor], np.ndarray]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(
    weight: np.ndarray,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    v2: bool = False,
    seed: int = 0,
) -> Packed:
    """weight: [N, K] float32. group: -1 for one per column of the file."""
    k = weight.shape[1]
    group = k if group == -1 else group
    groups = k // group
    group_of = np.arange(k) // group
    if act_order:
        group_of = np.random.default_rng(seed).permutation(group_of)
    codes, scales, zeros = _grid(weight, group_of, groups, bits, symmetric)
    stored_zeros = zeros if v2 else (zeros - 1) % (1 << bits)
    tensors = {
        "qweight": _words(codes.T, bits, along=0),
        "qzeros": _words(stored_zeros.T, bits, along=1),
        "scales": torch.from_numpy(scales.T.copy()).half(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    exact = (codes - zeros[:, group_of]).astype(np.float32) * scales[:, group_of]
    return tensors, exact


def awq(weight: np.ndarray, *, group: int = 32) -> Packed:
    """weight: [N, K] float32, N a multiple of 8."""
    n, k = weight.shape
    group_of = np.arange(k) // group
    codes, scales, zeros = _grid(weight, group_of, k // group, 4, symmetric=False)
    order = [base + i for base in range(0, n, 8) for i in _AWQ_ORDER]
    tensors = {
        "qweight": _words(codes.T[:, order], 4, along=1),
        "qzeros": _words(zeros.T[:, order], 4, along=1),
        "scales": torch.from_numpy(scales.T.copy()).half(),
    }
    return tensors, (codes - zeros[:, group_of]).astype(np.float32) * scales[:, group_of]


def fp8(weight: np.ndarray, *, block: int | None = None, channels: bool = False, name: str = "weight_scale") -> Packed:
    """One scale for all, one per row (`channels`), or one per `block` x `block`."""
    n, k = weight.shape
    high, wide = (block, block) if block else ((1, k) if channels else (n, k))
    scale = np.zeros((-(-n // high), -(-k // wide)), np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = abs(weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide]).max() / 448
    spread = scale.repeat(high, 0)[:n].repeat(wide, 1)[:, :k]
    codes = torch.from_numpy(weight / spread).to(torch.float8_e4m3fn)
    stored = torch.from_numpy(scale if block or channels else scale.reshape(()))
    return {"weight": codes, name: stored}, _e4m3(codes) * spread


def int8(weight: np.ndarray) -> Packed:
    """One scale per row."""
    scale = (abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(weight / scale).astype(np.int8)
    return {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scale)}, codes * scale


def _grid(
    weight: np.ndarray, group_of: np.ndarray, groups: int, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [N, K] in 0 .. 2^bits - 1, scales [N, G] that float16 can hold, zeros [N, G] on the same grid as codes."""
    steps = (1 << bits) - 1
    n, k = weight.shape
    codes = np.zeros((n, k), np.int64)
    scales, zeros = np.zeros((n, groups), np.float32), np.zeros((n, groups), np.int64)
    for g in range(groups):
        members = weight[:, group_of == g]
        low, high = np.minimum(members.min(1), 0), np.maximum(members.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[:, g] = ((high - low) / steps).astype(np.float16)
        zeros[:, g] = (1 << (bits - 1)) if symmetric else np.clip(np.rint(-low / scales[:, g]), 0, steps)
        rounded = np.rint(members / scales[:, g : g + 1]) + zeros[:, g : g + 1]
        codes[:, group_of == g] = np.clip(rounded, 0, steps)
    return codes, scales, zeros


def _words(values: np.ndarray, bits: int, *, along: int) -> Tensor:
    """32 / bits consecutive values of one axis per int32, the first in the lowest bits."""
    count = 32 // bits
    values = np.moveaxis(values, along, -1)
    words = np.zeros((*values.shape[:-1], values.shape[-1] // count), np.int64)
    for i in range(count):
        words |= values[..., i::count].astype(np.int64) << (bits * i)
    return torch.from_numpy(np.moveaxis(words, -1, along).astype(np.uint32).view(np.int32).copy())


def _e4m3(codes: Tensor) -> np.ndarray:
    """By the definition: sign, four bits of exponent with bias 7, three bits of fraction; exponent 0 is subnormal."""
    bits = codes.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent, fraction = bits >> 7, bits >> 3 & 15, bits & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return (np.where(exponent == 0, fraction / 8 * 2.0**-6, normal) * (1 - 2 * sign)).astype(np.float32)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
COMPRESSED["config_groups"] = {"group_0": {"weights": {"type": "float", "num_bits": 8}, "input_activations": {}}}

FORMATS: dict[str, tuple[dict[str, Any], Callable[..., Packed]]] = {
    "gptq4": (GPTQ, gptq),
    "gptq4-asymmetric": (GPTQ | {"sym": False}, partial(gptq, symmetric=False)),
    "gptq4-act-order": (GPTQ | {"desc_act": True}, partial(gptq, act_order=True)),
    "gptq4-one-group": (GPTQ | {"group_size": -1}, partial(gptq, group=-1)),
    "gptq4-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, partial(gptq, symmetric=False, v2=True)),
    "gptq8": (GPTQ | {"bits": 8}, partial(gptq, bits=8)),
    "gptq8-asymmetric": (GPTQ | {"bits": 8}, partial(gptq, bits=8, symmetric=False, act_order=True)),
    "awq": (AWQ, awq),
    "fp8-tensor": (FP8, fp8),
    "fp8-block": (FP8 | {"weight_block_size": [128, 128]}, partial(fp8, block=128, name="weight_scale_inv")),
    "fp8-channel": (COMPRESSED, partial(fp8, channels=True)),
}


def write_packed(folder: Path, config: dict[str, Any], settings: dict[str, Any] | None, pack: Any) -> nn.Module:
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


def write_packed_experts(
    folder: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    pack: Any,
    beyond: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """A checkpoint with the projections and the experts of every layer packed, and `beyond`; the float model."""
    plain = reference_model(config)
    assert any("experts" in name for name in plain.state_dict())
    tensors: dict[str, torch.Tensor] = dict(beyond or {})
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            base, _, ending = name.rpartition(".")
            if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
                tensors |= pack_experts(name, value, pack)
            elif base.endswith(("_proj", "_proj_with_mqa")) and ending == "weight":
                packed, exact = pack(value.numpy())
                tensors |= {f"{base}.{part}": tensor for part, tensor in packed.items()}
                value.copy_(torch.from_numpy(exact))
            else:
                tensors[name] = value.clone()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return plain


def pack_experts(name: str, value: torch.Tensor, pack: Any) -> dict[str, torch.Tensor]:
    """value: [E, F, M], all experts of a layer in one, as transformers keeps them; it takes on the packed numbers."""
    tensors: dict[str, torch.Tensor] = {}
    base, _, last = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    for expert, whole in enumerate(value):
        for part, matrix in zip(parts, whole.chunk(len(parts)), strict=True):
            packed, exact = pack(matrix.numpy())
            tensors |= {f"{base}.{expert}.{part}.{ending}": tensor for ending, tensor in packed.items()}
            matrix.copy_(torch.from_numpy(exact))
    return tensors


def write_mxfp4(folder: Path, config: dict[str, Any]) -> nn.Module:
    """A gpt-oss checkpoint as its authors publish it, experts in MXFP4; the float model with the same numbers."""
    plain = reference_model(config)
    rng = np.random.default_rng(0)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = value.clone()
                continue
            experts, inputs, outputs = value.shape
            numbers = rng.integers(0, 16, (experts, outputs, inputs // 32, 32), np.uint8)
            scales = rng.integers(120, 125, (experts, outputs, inputs // 32), np.uint8)
            exact = magnitudes[numbers & 7] * np.where(numbers & 8, -1, 1) * 2.0 ** (scales[..., None] - 127.0)
            value.copy_(torch.from_numpy(exact.reshape(experts, outputs, inputs)).transpose(1, 2))
            tensors[f"{name}_blocks"] = torch.from_numpy(numbers[..., ::2] | numbers[..., 1::2] << 4)
            tensors[f"{name}_scales"] = torch.from_numpy(scales)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return plain
