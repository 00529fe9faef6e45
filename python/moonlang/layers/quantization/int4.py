"""int4 weights in groups along k, each with a scale and a zero point. Made while loading."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.quantization import int8
from moonlang.layers.quantization.scheme import Scheme

_GROUP = 128
_STEPS = 15.0


def make(weight: Tensor) -> QuantizedMatrix:
    """The smallest and the largest weight of a group, or 0 if that lies outside, become -8 and 7.

    The last group may be short. Matrices narrower than a group are small: they become int8.
    """
    n, k = weight.shape
    if k < _GROUP:
        return int8.make(weight)
    groups = -(-k // _GROUP)
    padded = F.pad(weight.float(), (0, groups * _GROUP - k)).view(n, groups, _GROUP)
    low, high = padded.amin(2).clamp_(max=0), padded.amax(2).clamp_(min=0)
    scales = (high - low).div_(_STEPS).clamp_(min=torch.finfo(torch.float32).tiny)
    zeros = (-8 - low / scales).round_()
    codes = (padded / scales.unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(-8, 7).to(torch.int8)
    codes = codes.view(n, groups * _GROUP)[:, :k].contiguous()
    return QuantizedMatrix(kind="int4", codes=codes, scales=scales, zeros=zeros, group=_GROUP)


BACKEND = Scheme(make=make)
