"""Choosing tokens with the CPU kernels: the `layers.token_choice.Chooser` that does not sort the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sgl_kernel import sampling

from moonlang.core.sampling import SamplingParams

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

    def penalise(self, logits: Floats, ids: Ints, counts: Floats, params: SamplingParams) -> None:
        sampling.penalise(
            logits,
            ids,
            counts,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            repetition=params.repetition_penalty,
        )

    def log_probabilities(
        self, logits: Floats, temperature: Floats, ids: Ints, top: int
    ) -> list[tuple[list[float], list[tuple[float, int]]]]:
        rows, vocab = logits.shape
        values, top_values = np.empty(ids.shape, np.float32), np.empty((rows, min(top, vocab)), np.float32)
        top_ids = np.empty(top_values.shape, np.int32)
        sampling.log_probabilities(
            logits, temperature=temperature, ids=ids, id_values=values, top_ids=top_ids, top_values=top_values
        )
        pairs: Any = zip(top_values.tolist(), top_ids.tolist(), strict=True)
        best = [list(zip(row, tokens, strict=True)) for row, tokens in pairs]
        own: Any = values.tolist()
        return list(zip(own, best, strict=True))
