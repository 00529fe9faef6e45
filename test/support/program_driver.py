"""Drives a model as a program of the CPU kernels, like PagedDriver drives one of torch."""

from __future__ import annotations

import numpy as np
import torch
from paged_driver import PagedDriver, Sequence
from torch import Tensor, nn

from moonlang.config.model_config import ModelConfig
from moonlang.model_executor import program_network
from moonlang.model_executor.layout import Batch
from moonlang.models.spec import ModelSpec


class ProgramDriver(PagedDriver):
    """The pool is as old and used as that of PagedDriver. A sequence's slot is its place among the rows."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, page_size: int, num_pages: int) -> None:
        super().__init__(nn.Module(), spec.kv_schema(config, page_size), num_pages)
        self.network = program_network.load(config, spec, "auto").connect(self.pool)

    def scores(self, rows: list[tuple[Sequence, int]]) -> Tensor:
        table = np.full((len(rows), 1 + max(len(s.pages) for s, _ in rows)), -1, np.int32)
        for row, (sequence, _) in enumerate(rows):
            table[row, : len(sequence.pages)] = sequence.pages
        ids = [t for s, n in rows for t in s.tokens[s.computed : s.computed + n]]
        batch = Batch(
            np.array(ids),
            np.arange(len(rows)),
            np.array([s.computed for s, _ in rows]),
            np.array([n for _, n in rows]),
            table,
            self.page,
        )
        hidden = self.network.forward(batch, np.arange(len(ids)), None)
        half = len(ids) // 2
        return torch.cat([hidden.logits(0, half).clone(), hidden.logits(half, len(ids)).clone()])
