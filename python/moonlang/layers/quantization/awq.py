"""AWQ checkpoints, version "gemm": 4 bits in groups along k, with zero points.

qweight  [K, N / 8] int32    eight consecutive n per word, in the order 0 2 4 6 1 3 5 7 from the lowest bits
qzeros   [G, N / 8] int32    the same
scales   [G, N]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moonlang.config.quantization import Quantization
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization.gptq import unpack
from moonlang.layers.quantization.scheme import Scheme

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # column i of eight is in nibble _PLACES[i]


def read(tensors: Mapping[str, Tensor], settings: Quantization) -> QuantizedMatrix:
    """See Scheme.read."""
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, n = scales.shape
    k = len(qweight)
    if qweight.shape[1] * 8 != n or qzeros.shape != (groups, n // 8) or k % groups:
        raise ValueError(f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, scales {tuple(scales.shape)}")
    return QuantizedMatrix(
        kind="int4",
        codes=_columns(qweight).T.contiguous() - 8,
        scales=scales.T.float().contiguous(),
        zeros=(_columns(qzeros).T.float() - 8).contiguous(),
        group=k // groups,
    )


def _columns(words: Tensor) -> Tensor:
    """[R, N / 8] int32 -> [R, N] int8 in 0..15, columns in their own order."""
    return unpack(words, 4)[:, :, _PLACES].reshape(len(words), -1).to(torch.int8)


def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """See Scheme.shape."""
    k, words = shapes["qweight"]
    return words * 8, k


BACKEND = Scheme(codes="qweight", beside=("qzeros", "scales"), read=read, shape=shape)
