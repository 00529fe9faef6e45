"""Attention in float64, token by token: what the kernels are tested against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def attend(
    q: Floats,
    keys: Floats,
    values: Floats,
    start: int,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Floats | None = None,
) -> Floats:
    """One row: q [n, H, Dk] at positions start and on, keys [S, K, Dk], values [S, K, Dv] -> [n, H, Dv]."""
    count, heads, _ = q.shape
    group = heads // keys.shape[1]
    out = np.zeros((count, heads, values.shape[2]))
    for i in range(count):
        end = start + i + 1
        begin = max(0, end - window) if window else 0
        for head in range(heads):
            scores = scale * (keys[begin:end, head // group] @ q[i, head])
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            top = scores.max()
            if sinks is not None:
                top = max(top, sinks[head])
            weights = np.exp(scores - top)
            total = weights.sum() + (np.exp(sinks[head] - top) if sinks is not None else 0.0)
            out[i, head] = weights @ values[begin:end, head // group] / total
    return out
