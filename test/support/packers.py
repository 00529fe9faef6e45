"""Quantised tensors made by the definition of their formats, word by word with plain numpy: slow, and nobody's code.

Every packer returns the tensors of one matrix, by ending, and the float32 matrix that they stand for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
