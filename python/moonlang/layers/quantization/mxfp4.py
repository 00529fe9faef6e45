"""MXFP4 (OCP microscaling formats, version 1.0): numbers of four bits, and one power of two for each 32 of a row.

blocks  [..., K / 32, 16] uint8: two numbers a byte, the first in the low bits; a sign and one of eight magnitudes
scales  [..., K / 32] uint8: the exponent of two, plus 127

Twice every number is whole, so a matrix is brought into int8 with groups of 32, and nothing is lost. Only stacked
experts are published so (`model_loader.stacked_experts`): there are no matrices of this form by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization.scheme import Scheme

_GROUP = 32
_BIAS = 127
_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)  # the magnitudes


def matrix(blocks: Tensor, scales: Tensor) -> QuantizedMatrix:
    """blocks: [N, K / 32, 16], scales: [N, K / 32], both uint8 -> [N, K]. ValueError when they do not go together."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales are {blocks.dtype} and {scales.dtype}")
    if blocks.shape != (*scales.shape, _GROUP // 2):
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit blocks of shape {tuple(blocks.shape)}")
    codes = torch.tensor([*_TWICE, *(-value for value in _TWICE)], dtype=torch.int8)
    pairs = torch.stack((blocks & 15, blocks >> 4), -1)
    return QuantizedMatrix(
        kind="int8",
        codes=codes[pairs.flatten(1).int()],
        scales=torch.exp2(scales.float() - (_BIAS + 1)),
        group=_GROUP,
    )


BACKEND = Scheme(codes="blocks")
