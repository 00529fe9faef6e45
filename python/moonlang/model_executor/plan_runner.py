"""PlanRunner: a StepPlan in, a StepResult out. Plans run strictly in order, in one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moonlang.base import clock
from moonlang.core.plan import Row, RowResult, StepPlan, StepResult, TokenLogprob
from moonlang.distributed.group import Group
from moonlang.layers.token_choice import Chooser, NumpyChooser
from moonlang.model_executor import prompt_logprobs
from moonlang.model_executor.layout import Batch, gather
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.sampling import Sampled, greedy, sample
from moonlang.model_executor.slots import SlotTable

Ints = NDArray[np.int64]


class Hidden(Protocol):
    """Hidden states of the tokens that a forward was asked to keep. Valid until the network's next forward."""

    def logits(self, begin: int, end: int) -> torch.Tensor:
        """[end - begin, V] float32 of the kept tokens [begin, end), to be overwritten at will; until the next call."""
        ...

    def best(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        """The most probable token after each of the kept tokens [begin, end), the first of equals, and which of them,
        counted from `begin`, have logits that are no finite numbers: theirs means nothing."""
        ...


class Network(Protocol):
    """A loaded model together with its KV pool."""

    def forward(self, batch: Batch, kept: Ints, progress: Progress | None) -> Hidden | None:
        """Compute the batch; its keys and values are in the pool afterwards. kept: [N] indices of tokens [T]. None: it
        goes on in the next stage of a pipeline.

        progress: told of every layer whose keys and values are there; None: nobody wants to know.
        """
        ...


class StepTimes(NamedTuple):
    """Where the time of one step went, in nanoseconds. A batch of greedy rows is sampled with the logits."""

    layout: int = 0
    forward: int = 0
    logits: int = 0
    sample: int = 0
    result: int = 0


class PlanRunner:
    """Executes plans over a network and a slot table; knows nothing of checkpoints, flags and memory.

    times: how the last plan spent its time.
    """

    def __init__(
        self,
        network: Network,
        table: SlotTable,
        *,
        page_size: int,
        vocab_size: int,
        chooser: Chooser | None = None,
        group: Group | None = None,
        in_rounds: bool = False,
    ) -> None:
        """chooser: makes tokens of logits, the reference when None. group: ranks that run the same plans, each over its
        shard; rank 0 chooses the tokens. in_rounds: a plan without rows is a forward, too, as others need this rank for
        theirs."""
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.times = StepTimes()
        self._network = network
        self._table = table
        self._chooser = chooser or NumpyChooser()
        self._group = group
        self._in_rounds = in_rounds

    def connect(self, network: Network, *, in_rounds: bool) -> None:
        """Compute with another network over the same pool from now on; slots are as they were."""
        self._network = network
        self._in_rounds = in_rounds

    @torch.inference_mode()
    def run(self, plan: StepPlan, progress: Progress | None = None) -> StepResult:
        """Apply the plan's starts, compute its rows, sample where they ask for it. progress: who wants to know.

        Of a stage of a pipeline but the last one the result has no rows.
        """
        begin = clock.monotonic_ns()
        for tenant in plan.starts:
            self._table.start(tenant)
        rows = plan.rows
        if not rows:
            if self._in_rounds:
                self._idle()
            return StepResult(plan.plan_id, ())
        self._table.assign_pages(rows)
        slots = np.array([row.slot for row in rows], np.int64)
        batch = gather(rows, slots, self._table, self.page_size)
        picked = [i for i, row in enumerate(rows) if row.sample]
        ends = batch.ends()
        reports = self._reports(rows, ends)
        kept = ends[picked] - 1
        if reports:
            kept = np.concatenate([kept, *(tokens for _, tokens in reports)])
        laid_out = clock.monotonic_ns()
        reporting = progress if progress is not None and plan.report_layers else None
        if reporting is not None:
            reporting.begin(plan.plan_id, plan.report_layers)
        hidden = self._network.forward(batch, kept, reporting)
        projected = forwarded = clock.monotonic_ns()
        if hidden is None:
            self.times = StepTimes(laid_out - begin, forwarded - laid_out)
            return StepResult(plan.plan_id, (), forwarded - begin)
        sampled = None
        if picked and self._table.greedy(slots[picked]):
            sampled = greedy(self._table, slots[picked], *hidden.best(0, len(picked)))
            projected = clock.monotonic_ns()
        elif picked:
            logits = hidden.logits(0, len(picked))
            projected = clock.monotonic_ns()
            at = batch.starts[picked] + batch.lengths[picked]
            sampled = self._sample(slots[picked], at, logits)
        elif self._group is not None and not reports:
            self._group.barrier()  # no rank's logits were waited for: now the pages of all are written
        prompt = self._prompt_logprobs(rows, reports, hidden, len(picked))
        drawn = clock.monotonic_ns()
        results = _results(rows, picked, sampled, prompt)
        end = clock.monotonic_ns()
        self.times = StepTimes(
            laid_out - begin, forwarded - laid_out, projected - forwarded, drawn - projected, end - drawn
        )
        return StepResult(plan.plan_id, results, end - begin)

    def _idle(self) -> None:
        """A forward of one token that means nothing, over page 0."""
        table = self._table.page_table
        one, nobody = np.ones(1, np.int64), np.array([len(table) - 1], np.int64)
        batch = Batch(np.zeros(1, np.int64), nobody, np.zeros(1, np.int64), one, table, self.page_size)
        self._network.forward(batch, np.zeros(0, np.int64), None)

    def _sample(self, slots: Ints, positions: Ints, logits: torch.Tensor) -> Sampled:
        """See `sampling.sample`: by rank 0, which alone knows the grammars, and told to the others."""
        if self._group is None:
            return sample(self._table, self._chooser, slots, positions, logits)
        if self._group.rank == 0:
            sampled = sample(self._table, self._chooser, slots, positions, logits)
            self._group.broadcast(torch.tensor(sampled.tokens))
            return sampled
        tokens = self._group.broadcast(torch.zeros(len(slots), dtype=torch.int64)).tolist()
        self._table.last_token[slots] = tokens
        return Sampled(tokens)

    def _reports(self, rows: Sequence[Row], ends: Ints) -> list[tuple[int, Ints]]:
        """(index of the row, its tokens among the batch) where log probabilities of the prompt were asked for."""
        asked = self._table.next_prompt
        if not asked:
            return []
        return [(i, np.arange(ends[i] - row.length, ends[i])) for i, row in enumerate(rows) if row.slot in asked]

    def _prompt_logprobs(
        self, rows: Sequence[Row], reports: Sequence[tuple[int, Ints]], hidden: Hidden, first: int
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        """By index of the row. first: where the tokens of the reports begin among those kept."""
        found = {}
        for i, tokens in reports:
            part = prompt_logprobs.Part(hidden, first)
            found[i] = prompt_logprobs.report(self._table, self._chooser, rows[i], part, self.vocab_size)
            first += len(tokens)
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
