"""PlanRunner: a StepPlan in, a StepResult out. Plans run strictly in order, in one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moonlang.attention.batch import BatchLayout
from moonlang.base import clock
from moonlang.core.plan import Row, RowResult, StepPlan, StepResult, TokenLogprob
from moonlang.model_executor import layout as layouts
from moonlang.model_executor import prompt_logprobs
from moonlang.model_executor.buckets import exact
from moonlang.model_executor.sampling import Sampled, sample
from moonlang.model_executor.slots import SlotTable

Ints = NDArray[np.int64]


class Network(Protocol):
    """A loaded model together with its KV pool."""

    def forward(self, input_ids: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Hidden states [T, M] of the tokens [T]; their keys and values are in the pool afterwards."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, M] -> [N, V] float32, memory of its own."""
        ...


class StepTimes(NamedTuple):
    """Where the time of one step went, in nanoseconds."""

    layout: int = 0
    forward: int = 0
    logits: int = 0
    sample: int = 0
    result: int = 0


class PlanRunner:
    """Executes plans over a network and a slot table; knows nothing of checkpoints, flags and memory.

    rounded: how many tokens to compute for a given number (see `buckets`). times: how the last plan spent its time.
    """

    def __init__(
        self,
        network: Network,
        table: SlotTable,
        *,
        page_size: int,
        vocab_size: int,
        device: torch.device,
        rounded: Callable[[int], int] = exact,
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.device = device
        self.times = StepTimes()
        self._network = network
        self._table = table
        self._rounded = rounded

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Apply the plan's starts, compute its rows, sample where they ask for it."""
        begin = clock.monotonic_ns()
        for tenant in plan.starts:
            self._table.start(tenant)
        rows = plan.rows
        if not rows:
            return StepResult(plan.plan_id, ())
        self._table.assign_pages(rows)
        computed = (*rows, *self._padding(rows))
        slots = np.array([row.slot for row in computed], np.int64)
        ids, layout = layouts.build(computed, slots, self._table, self.page_size, self.device)
        laid_out = clock.monotonic_ns()
        hidden = self._network.forward(ids, layout)
        forwarded = clock.monotonic_ns()
        picked = [i for i, row in enumerate(rows) if row.sample]
        ends = np.cumsum(layout.row_lengths)
        logits = self._logits(hidden, ends[: len(rows)], picked)
        projected = clock.monotonic_ns()
        prompt = self._prompt_logprobs(rows, hidden, ends)
        sampled = None
        if logits is not None:
            at = np.array([rows[i].start + rows[i].length for i in picked], np.int64)
            sampled = sample(self._table, slots[picked], at, logits)
        drawn = clock.monotonic_ns()
        results = _results(rows, picked, sampled, prompt)
        end = clock.monotonic_ns()
        self.times = StepTimes(
            laid_out - begin, forwarded - laid_out, projected - forwarded, drawn - projected, end - drawn
        )
        return StepResult(plan.plan_id, results, end - begin)

    def _padding(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Rows that fill the batch up to its rounded size and whose results nobody reads."""
        tokens = sum(row.length for row in rows)
        missing = self._rounded(tokens) - tokens
        if missing == 0:
            return ()
        slot = self._table.scratch
        if tokens == len(rows):
            return [Row(slot, -1, 0, 1, (), False)] * missing
        longest = min(missing, self._table.page_table.shape[1] * self.page_size)
        lengths = [min(longest, missing - done) for done in range(0, missing, longest)]
        return [Row(slot, -1, 0, length, (0,) * length, False) for length in lengths]

    def _logits(self, hidden: torch.Tensor, ends: Ints, picked: Sequence[int]) -> torch.Tensor | None:
        """[N, V] for the last positions of the picked rows. ends: where each row ends in hidden [T, M]."""
        if not picked:
            return None
        if len(picked) < ends[-1]:
            hidden = hidden[torch.from_numpy(ends[picked] - 1).to(self.device)]
        return self._rounded_logits(hidden)[: len(picked)]

    def _rounded_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [N, M] -> [N, V]"""
        count = hidden.shape[0]
        padding = self._rounded(count) - count
        return self._network.logits(F.pad(hidden, (0, 0, 0, padding)) if padding else hidden)[:count]

    def _prompt_logprobs(
        self, rows: Sequence[Row], hidden: torch.Tensor, ends: Ints
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        """By index of the row, for the rows that were asked for them."""
        if not self._table.next_prompt:
            return {}
        found = {}
        for i, row in enumerate(rows):
            if row.slot in self._table.next_prompt:
                part = hidden[ends[i] - row.length : ends[i]]
                found[i] = prompt_logprobs.report(self._table, row, part, self._rounded_logits, self.vocab_size)
        return found


def _results(
    rows: Sequence[Row], picked: Sequence[int], sampled: Sampled | None, prompt: dict[int, tuple[TokenLogprob, ...]]
) -> tuple[RowResult, ...]:
    if sampled is None:
        return tuple(RowResult(row.slot, row.epoch, prompt=prompt.get(i, ())) for i, row in enumerate(rows))
    if sampled.plain and not prompt and len(picked) == len(rows):
        return tuple(RowResult(row.slot, row.epoch, (token,)) for row, token in zip(rows, sampled.tokens, strict=True))
    order = {i: n for n, i in enumerate(picked)}
    return tuple(_result(row, order.get(i), sampled, prompt.get(i, ())) for i, row in enumerate(rows))


def _result(row: Row, n: int | None, sampled: Sampled, prompt: tuple[TokenLogprob, ...]) -> RowResult:
    """n: index of the row among the sampling rows; None when it does not sample."""
    if n is None:
        return RowResult(row.slot, row.epoch, prompt=prompt)
    if n in sampled.errors:
        return RowResult(row.slot, row.epoch, prompt=prompt, error=sampled.errors[n])
    output = (sampled.output[n],) if n in sampled.output else ()
    return RowResult(row.slot, row.epoch, (sampled.tokens[n],), output, prompt, n in sampled.ended)
