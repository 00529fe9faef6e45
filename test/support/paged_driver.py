"""Drives a model without a runner: sequences with page tables, mixed batches, chunks, shared prefixes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from moonlang.attention.batch import AttentionBackend, BatchLayout, ForwardContext
from moonlang.attention.torch_native import TorchNative
from moonlang.core.kv import KvSchema
from moonlang.model_executor.kv_pool import KvPool


@dataclass
class Sequence:
    """tokens: prompt, then what was generated. logits: [V] per computed position, from position `first` on."""

    tokens: list[int]
    prompt: int
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    first: int = 0
    logits: list[Tensor] = field(default_factory=list)


class PagedDriver:
    """A pool whose pages are handed out in random order and are full of old numbers, as after hours of service."""

    def __init__(
        self, model: nn.Module, schema: KvSchema, num_pages: int, backend: AttentionBackend | None = None
    ) -> None:
        self.model = model
        self.page = schema.page_size
        self.pool = KvPool(schema, num_pages)
        self.pool.buffer.fill_(float("nan"))
        self.backend = backend or TorchNative()
        self.free = list(range(num_pages))
        random.Random(0).shuffle(self.free)

    def sequence(self, tokens: list[int], prefix_of: Sequence | None = None) -> Sequence:
        """A new sequence; the full pages it has in common with `prefix_of` are taken from there, not computed."""
        made = Sequence(list(tokens), len(tokens))
        if prefix_of is not None:
            pairs = zip(tokens[:-1], prefix_of.tokens[: prefix_of.computed], strict=False)
            same = sum(accumulate((int(a == b) for a, b in pairs), lambda x, y: x * y))
            made.pages = prefix_of.pages[: same // self.page]
            made.computed = made.first = len(made.pages) * self.page
        return made

    def grow(self, rows: list[tuple[Sequence, int]]) -> None:
        """Give each sequence the pages it needs."""
        for sequence, count in rows:
            while len(sequence.pages) * self.page < sequence.computed + count:
                sequence.pages.append(self.free.pop())

    def layout(self, rows: list[tuple[Sequence, int]]) -> BatchLayout:
        """rows: (sequence, tokens to compute); decode rows first."""
        starts, lengths = [s.computed for s, _ in rows], [n for _, n in rows]
        positions = [p for s, n in rows for p in range(s.computed, s.computed + n)]
        widest = max(len(s.pages) for s, _ in rows)
        return BatchLayout(
            num_decode=next((i for i, n in enumerate(lengths) if n > 1), len(rows)),
            starts=torch.tensor(starts),
            lengths=torch.tensor(lengths),
            positions=torch.tensor(positions),
            page_table=torch.tensor([s.pages + [0] * (widest - len(s.pages)) for s, _ in rows]),
            store_page=torch.tensor(
                [s.pages[p // self.page] for s, n in rows for p in range(s.computed, s.computed + n)]
            ),
            store_offset=torch.tensor([p % self.page for p in positions]),
            row_starts=starts,
            row_lengths=lengths,
        )

    def scores(self, rows: list[tuple[Sequence, int]]) -> Tensor:
        """Logits [T, V] of the rows."""
        ids = torch.tensor([t for s, n in rows for t in s.tokens[s.computed : s.computed + n]])
        return self.model.logits(self.model(ids, ForwardContext(self.layout(rows), self.pool, self.backend)))

    @torch.inference_mode()
    def forward(self, rows: list[tuple[Sequence, int]]) -> None:
        """Compute the rows, keep their logits, and append the best token to sequences that have caught up."""
        self.grow(rows)
        for (sequence, count), row in zip(rows, self.scores(rows).split([n for _, n in rows]), strict=True):
            sequence.logits += row
            sequence.computed += count
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(int(row[-1].argmax()))

    def generate(self, sequences: list[Sequence], chunk: int, new_tokens: int) -> None:
        """Run all sequences to prompt + new_tokens; one forward computes at most `chunk` prompt tokens of each."""
        while rows := self._rows(sequences, chunk, new_tokens):
            self.forward(rows)

    @staticmethod
    def _rows(sequences: list[Sequence], chunk: int, new_tokens: int) -> list[tuple[Sequence, int]]:
        todo = [s for s in sequences if len(s.tokens) - s.prompt < new_tokens]
        rows = [(s, min(chunk, len(s.tokens) - s.computed)) for s in todo]
        return [row for row in rows if row[1] == 1] + [row for row in rows if row[1] > 1]
