"""What the runner does with logits: choose tokens, mask, and report log probabilities; by numpy or by the CPU kernels.

Both follow the definitions of `layers.sampler`. They round differently in the last bit, so one engine stays with one.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moonlang.core.sampling import SamplingParams
from moonlang.layers import penalties, sampler

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How to choose, each [N]. temperature 0 takes the most probable token; top_k 0 keeps all; see `sampler.draw`."""

    temperature: Floats
    top_k: Ints
    top_p: NDArray[np.float64]
    min_p: Floats
    seeds: Ints
    positions: Ints


class Chooser(Protocol):
    """One implementation."""

    def choose(self, logits: Floats, choice: Choice | None) -> tuple[Ints, Floats]:
        """One token per row of logits [N, V], and the largest logit of each row. choice None: the most probable.

        Where the largest logit is not finite (NaN if the row has one) the token means nothing.
        """
        ...

    def mask(self, logits: Floats, bits: NDArray[np.int32]) -> None:
        """Set to -inf the logits [V] of the tokens whose bit [ceil(V / 32)] is 0."""
        ...

    def penalise(self, logits: Floats, ids: Ints, counts: Floats, params: SamplingParams) -> None:
        """See `penalties.penalise`."""
        ...

    def log_probabilities(
        self, logits: Floats, temperature: Floats, ids: Ints, top: int
    ) -> list[tuple[list[float], list[tuple[float, int]]]]:
        """For each row of log softmax(logits [N, V] / temperature [N]): the values at `ids` [N, n], and the `top` best
        as (logprob, token), best first."""
        ...


class NumpyChooser:
    """The reference."""

    def choose(self, logits: Floats, choice: Choice | None) -> tuple[Ints, Floats]:
        tokens = logits.argmax(axis=-1)
        peaks = logits[np.arange(len(logits)), tokens]
        rows = np.flatnonzero((choice.temperature > 0) & np.isfinite(peaks)) if choice is not None else tokens[:0]
        if choice is not None and rows.size:
            tokens[rows] = sampler.draw(
                logits if rows.size == len(logits) else logits[rows],
                peaks[rows],
                temperature=choice.temperature[rows],
                top_k=choice.top_k[rows],
                top_p=choice.top_p[rows],
                min_p=choice.min_p[rows],
                uniform=sampler.uniforms(choice.seeds[rows], choice.positions[rows]),
            )
        return tokens, peaks

    def mask(self, logits: Floats, bits: NDArray[np.int32]) -> None:
        allowed = np.unpackbits(bits.view(np.uint8), count=len(logits), bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def penalise(self, logits: Floats, ids: Ints, counts: Floats, params: SamplingParams) -> None:
        penalties.penalise(logits, ids, counts, params)

    def log_probabilities(
        self, logits: Floats, temperature: Floats, ids: Ints, top: int
    ) -> list[tuple[list[float], list[tuple[float, int]]]]:
        logprobs = sampler.log_softmax(logits, temperature)
        return [(row[asked].tolist(), sampler.best(row, top)) for row, asked in zip(logprobs, ids, strict=True)]
