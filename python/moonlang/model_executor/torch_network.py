"""The torch path: a model of `models` with its pool and the attention backend that reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moonlang.attention.batch import AttentionBackend, ForwardContext
from moonlang.distributed.pipe import Pipe
from moonlang.model_executor.buckets import exact
from moonlang.model_executor.kv_pool import KvPool
from moonlang.model_executor.layout import Batch, Ints, padded, to_torch
from moonlang.model_executor.progress import Progress
from moonlang.models.spec import CausalModel


class TorchHidden:
    """See plan_runner.Hidden. states: [N, M]."""

    def __init__(self, model: CausalModel, states: torch.Tensor, rounded: Callable[[int], int]) -> None:
        self._model = model
        self._states = states
        self._rounded = rounded

    def logits(self, begin: int, end: int) -> torch.Tensor:
        padding = self._rounded(end - begin) - (end - begin)
        states = self._states[begin:end]
        return self._model.logits(F.pad(states, (0, 0, 0, padding)) if padding else states)[: end - begin]

    def best(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        # Only the winners leave an accelerator. torch takes a NaN for the largest, so a row with one is broken.
        peaks, tokens = self.logits(begin, end).max(dim=-1)
        return tokens.tolist(), (~peaks.isfinite()).nonzero()[:, 0].tolist()


class TorchNetwork:
    """See plan_runner.Network. rounded: how many tokens to compute for a given number (see `buckets`)."""

    def __init__(
        self,
        model: CausalModel,
        pool: KvPool,
        backend: AttentionBackend,
        device: torch.device,
        rounded: Callable[[int], int] = exact,
        pipe: Pipe | None = None,
    ) -> None:
        self._pipe = pipe
        self._model = model
        self._pool = pool
        self._backend = backend
        self._device = device
        self._rounded = rounded

    def forward(self, batch: Batch, kept: Ints, progress: Progress | None) -> TorchHidden | None:
        given, layout = to_torch(padded(batch, self._rounded(len(batch.ids))), self._device)
        stored = progress.stored if progress is not None else None
        pipe = self._pipe
        if pipe is not None and pipe.before is not None:
            given = pipe.take(self._model.room(len(given), self._device))
        states = self._model(given, ForwardContext(layout, self._pool, self._backend, stored))
        if pipe is not None and pipe.after is not None:
            pipe.give(states)
            return None
        return TorchHidden(self._model, states[torch.from_numpy(kept).to(self._device)], self._rounded)
