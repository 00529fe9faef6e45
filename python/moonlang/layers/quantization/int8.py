"""int8 weights, one scale per output channel, no zero points. Activations stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moonlang.config.quantization import Quantization
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization import fp8
from moonlang.layers.quantization.scheme import Scheme

_LARGEST = 127.0


def read(tensors: Mapping[str, Tensor], settings: Quantization) -> QuantizedMatrix:
    """See Scheme.read. The tensors are as in fp8.py, with int8 in place of float8."""
    codes = tensors["weight"]
    if codes.dtype != torch.int8:
        raise ValueError(f"weight is {codes.dtype}")
    scales, group = fp8.channel_scales(tensors, *codes.shape)
    return QuantizedMatrix(kind="int8", codes=codes, scales=scales, group=group)


def make(weight: Tensor) -> QuantizedMatrix:
    """The largest weight of each channel becomes 127."""
    weight = weight.float()
    scales = weight.abs().amax(1, keepdim=True).div_(_LARGEST)
    codes = (weight / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return QuantizedMatrix(kind="int8", codes=codes, scales=scales, group=weight.shape[1])


BACKEND = Scheme(
    beside=("weight_scale",), ignored=("input_scale", "output_scale"), read=read, shape=fp8.shape, make=make
)
