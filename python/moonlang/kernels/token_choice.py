"""Choosing tokens with the CPU kernels: the `layers.token_choice.Chooser` that does not sort the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sgl_kernel import sampling

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class KernelChooser:
    """See Chooser. The rows of a batch are shared out over the kernels' threads."""

    def choose(self, logits: Floats, choice: Any) -> tuple[Ints, Floats]:
        rows = len(logits)
        tokens, peaks = np.empty(rows, np.int64), np.empty(rows, np.float32)
        if choice is None:
            none, zeros = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
            sampling.sample(
                logits,
                temperature=zeros,
                top_k=none,
                top_p=np.ones(rows),
                min_p=zeros,
                seeds=none,
                positions=none,
                tokens=tokens,
                peaks=peaks,
            )
        else:
            sampling.sample(
                logits,
                temperature=choice.temperature,
                top_k=choice.top_k,
                top_p=choice.top_p,
                min_p=choice.min_p,
                seeds=choice.seeds,
                positions=choice.positions,
                tokens=tokens,
                peaks=peaks,
            )
        return tokens, peaks

    def mask(self, logits: Floats, bits: NDArray[np.int32]) -> None:
        sampling.apply_bitmask(logits[None], bits[None])

    def log_probabilities(
        self, logits: Floats, temperature: float, ids: Sequence[int], top: int
    ) -> tuple[list[float], list[tuple[float, int]]]:
        top = min(top, len(logits))
        values, top_values = np.empty((1, len(ids)), np.float32), np.empty((1, top), np.float32)
        top_ids = np.empty((1, top), np.int32)
        sampling.log_probabilities(
            logits[None],
            temperature=np.array([temperature], np.float32),
            ids=np.array([ids], np.int64),
            id_values=values,
            top_ids=top_ids,
            top_values=top_values,
        )
        return values[0].tolist(), list(zip(top_values[0].tolist(), top_ids[0].tolist(), strict=True))
