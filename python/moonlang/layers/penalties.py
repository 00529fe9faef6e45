"""What changes one sequence's logits before the temperature: penalties, logit_bias and min_new_tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moonlang.core.sampling import SamplingParams

# (logits [V], ids [n] of distinct tokens, counts [n] of their occurrences, parameters): adjusts the logits in place.
Penalise = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], SamplingParams], None]


def penalise(
    logits: NDArray[np.float32], ids: NDArray[np.int64], counts: NDArray[np.float32], params: SamplingParams
) -> None:
    """Subtract the frequency and presence penalties, then scale by the repetition penalty towards less likely."""
    values = logits[ids]
    values -= np.float32(params.frequency_penalty) * counts
    values -= np.float32(params.presence_penalty) * (counts > 0)
    if params.repetition_penalty != 1.0:
        scale = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / scale, values * scale)
    logits[ids] = values


class TokenCounts:
    """How often each token occurs in the output, kept for the tokens seen only.

    ids: [n] token ids, counts: [n] occurrences; a token of the prompt that was never sampled has count 0.
    """

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)

    def add(self, token: int, count: int = 1) -> None:
        at = self._index.get(token)
        if at is None:
            at = self._index[token] = len(self._index)
            if at == self._ids.shape[0]:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[at] = token
        self._counts[at] += count

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._index)]


class Adjuster:
    """The state of one slot. Built only for requests that need it; rebuilt from the tokens after a retraction.

    tokens is prompt plus output known so far; end_ids are the tokens that min_new_tokens holds back.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokens: Sequence[int],
        prompt_len: int,
        end_ids: Iterable[int],
        vocab_size: int,
    ) -> None:
        self._params = params
        self._first_end = prompt_len + params.min_new_tokens
        self._end_ids = np.array(sorted(t for t in set(end_ids) if 0 <= t < vocab_size), np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._seen = TokenCounts()
        if params.repetition_penalty != 1.0:
            for token in tokens[:prompt_len]:
                self._seen.add(token, 0)
        for token in tokens[prompt_len:]:
            self.accept(token)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.penalised or bool(params.logit_bias) or params.min_new_tokens > 0

    def accept(self, token: int) -> None:
        """Count a sampled token."""
        if self._params.penalised:
            self._seen.add(token)

    def apply(self, logits: NDArray[np.float32], position: int, penalise: Penalise) -> None:
        """Adjust the logits [V] of the token at `position` of the sequence in place."""
        if self._params.penalised:
            penalise(logits, self._seen.ids, self._seen.counts, self._params)
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if position < self._first_end:
            logits[self._end_ids] = -np.inf
