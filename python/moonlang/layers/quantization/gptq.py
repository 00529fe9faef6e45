"""GPTQ checkpoints: 4 or 8 bits, any group size, with or without activation order.

qweight  [K * bits / 32, N] int32   32 / bits consecutive k per word, lowest bits first
qzeros   [G, N * bits / 32] int32   consecutive n per word; files of version 1 hold zero point - 1
scales   [G, N]
g_idx    [K] int32                  the group of each k; with activation order (desc_act) not ascending
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moonlang.config.quantization import Quantization
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization.scheme import Scheme


def unpack(words: Tensor, bits: int) -> Tensor:
    """[R, C] int32 -> [R, C, 32 / bits] uint8, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)


def read(tensors: Mapping[str, Tensor], settings: Quantization) -> QuantizedMatrix:
    """See Scheme.read."""
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, n = scales.shape
    bits = qzeros.shape[1] * 32 // n
    if bits not in (4, 8) or qweight.shape[1] != n or len(qzeros) != groups:
        raise ValueError(f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, scales {tuple(scales.shape)}")
    middle, highest = 1 << (bits - 1), (1 << bits) - 1
    unpacked = unpack(qweight, bits).transpose(1, 2).reshape(-1, n)  # [K, N]
    k = len(unpacked)
    # A zero point of 0 is stored as -1 in version 1, which wraps around.
    zeros = (unpack(qzeros, bits).reshape(groups, n) + settings.zero_offset) & highest
    order = _order(tensors.get("g_idx"), k, groups)
    if order is not None:
        unpacked = unpacked[order]
    rows = unpacked.T.contiguous()
    centred = zeros.T.float() - middle
    return QuantizedMatrix(
        kind="int4" if bits == 4 else "int8",
        codes=(rows ^ middle).view(torch.int8) if bits == 8 else rows.view(torch.int8) - 8,
        scales=scales.T.float().contiguous(),
        zeros=centred.contiguous() if centred.any() else None,
        group=-(-k // groups),
        order=order,
    )


def _order(g_idx: Tensor | None, k: int, groups: int) -> Tensor | None:
    """The columns sorted by group, None when they are already. ValueError unless all groups have one size."""
    group = -(-k // groups)
    regular = torch.arange(k) // group
    if g_idx is None or torch.equal(g_idx.long(), regular):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), regular):
        raise ValueError(f"g_idx does not split {k} columns into {groups} groups of {group}")
    return order


def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """See Scheme.shape."""
    rows, n = shapes["qweight"]
    return n, rows * n // shapes["qzeros"][1]  # K * bits / 32 * N / (N * bits / 32)


BACKEND = Scheme(codes="qweight", beside=("qzeros", "scales", "g_idx"), read=read, shape=shape)
