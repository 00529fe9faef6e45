"""fp8 weights with scales: per tensor, per output channel or per block (as DeepSeek's 128 x 128).

weight            [N, K] float8_e4m3fn or float8_e5m2
weight_scale      [], [1], [P] for P matrices stacked in one, [N, 1], or [N / bn, K / bk] for blocks
weight_scale_inv  the same thing: it is to be multiplied by, whatever its name says
input_scale       for engines that compute in fp8; activations stay as they are here
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moonlang.config.quantization import Quantization
from moonlang.kernels.matrix import Kind, QuantizedMatrix
from moonlang.layers.quantization.scheme import Scheme

_BLOCK = 128  # the only size in use; a matrix may end within a block
_KINDS: dict[torch.dtype, Kind] = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
_LARGEST = 448.0  # of e4m3


def read(tensors: Mapping[str, Tensor], settings: Quantization) -> QuantizedMatrix:
    """See Scheme.read."""
    codes = tensors["weight"]
    kind = _KINDS.get(codes.dtype)
    if kind is None:
        raise ValueError(f"weight is {codes.dtype}")
    scale, group = channel_scales(tensors, *codes.shape)
    return QuantizedMatrix(kind=kind, codes=codes, scales=scale, group=group)


def channel_scales(tensors: Mapping[str, Tensor], n: int, k: int) -> tuple[Tensor, int]:
    """Scales of any granularity as [N, G], and the size of the groups."""
    scale = next((tensors[name].float() for name in ("weight_scale_inv", "weight_scale") if name in tensors), None)
    if scale is None:
        raise ValueError("it has no weight_scale")
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(n, 1).contiguous(), k
    if scale.shape in ((n,), (n, 1)):
        return scale.reshape(n, 1).contiguous(), k
    if scale.shape == (-(-n // _BLOCK), -(-k // _BLOCK)):
        return scale.repeat_interleave(_BLOCK, 0)[:n].contiguous(), _BLOCK
    raise ValueError(f"the scale of shape {tuple(scale.shape)} does not fit a weight of {n} x {k}")


def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """See Scheme.shape."""
    n, k = shapes["weight"]
    return n, k


def make(weight: Tensor) -> QuantizedMatrix:
    """One scale per output channel, so that its largest weight becomes the largest e4m3."""
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True).div_(_LARGEST)
    codes = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)).to(torch.float8_e4m3fn)
    return QuantizedMatrix(kind="fp8_e4m3", codes=codes, scales=scales, group=weight.shape[1])


BACKEND = Scheme(
    beside=("weight_scale", "weight_scale_inv"),
    ignored=("input_scale", "k_scale", "v_scale", "output_scale"),
    read=read,
    shape=shape,
    make=make,
)
