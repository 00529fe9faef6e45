"""The muscle of the simulator: runs plans on a paged hash chain and refuses what a real executor would get wrong.

It keeps what `core.plan` says an executor keeps: per slot the page table, the tokens and the sampling state. What it
checks on the way are the rules of the plan format; whether the pages hold the right cells shows in the tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from moonlang.core.plan import Row, RowResult, SlotStart, StepPlan, StepResult, TokenLogprob
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.sim.chain import ChainModel, cell, grammar_ends
from moonlang.sim.violation import Violation


class PagedCells:
    """The KV pool. Per page the running sums of its cells: entry o is cell[0] + ... + cell[o] of that page."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self._sums: list[list[int]] = [[] for _ in range(num_pages)]

    def __len__(self) -> int:
        return len(self._sums)

    def filled(self, page: int) -> int:
        """Cells of `page` written by its present tenant."""
        return len(self._sums[page])

    def read(self, table: list[int], length: int) -> int:
        """Attention over the first `length` positions of a page table."""
        whole, rest = divmod(length, self.page_size)
        total = 0
        for page in table[:whole]:
            sums = self._sums[page]
            if len(sums) < self.page_size:
                raise Violation("executor", f"page {page} is read in full but holds {len(sums)} cells")
            total += sums[-1]
        if rest:
            sums = self._sums[table[whole]]
            if len(sums) != rest:
                raise Violation("executor", f"page {table[whole]} should hold {rest} cells and holds {len(sums)}")
            total += sums[-1]
        return total

    def write(self, page: int, offset: int, value: int) -> None:
        """Store one cell. Offset 0 starts a new tenancy of the page: its old cells are gone."""
        sums = self._sums[page]
        if offset == 0:
            sums[:] = [value]
        elif offset == len(sums):
            sums.append(sums[-1] + value)
        else:
            raise Violation(
                "executor", f"cell {offset} of page {page} is written while the page holds {len(sums)} cells"
            )


@dataclass(slots=True)
class _Slot:
    """The executor's memory of one tenant. `computed`: positions whose cells are written; `tokens`: all known ids."""

    epoch: int
    prompt_len: int
    tokens: list[int]
    sampling: SamplingParams
    logprob: LogprobSpec | None
    table: list[int] = field(default_factory=list)
    computed: int = -1  # no row yet: the first one says how much is cached
    failed: bool = False  # a row has failed; rows planned before that was known are void


class ChainExecutor:
    """Runs plans one after the other. `poison` maps a sampling seed to the output length at which its row fails.

    aligned: a slot begins between two pages, since only whole pages are cached; not so where a prompt's pages come from
    another server, the last of them in part.
    """

    def __init__(
        self, model: ChainModel, cells: PagedCells, num_slots: int, poison: Mapping[int, int], *, aligned: bool = True
    ) -> None:
        self.model = model
        self._cells = cells
        self._slots: list[_Slot | None] = [None] * num_slots
        self._poison = poison
        self._aligned = aligned
        self._last_plan: int | None = None

    def run(self, plan: StepPlan) -> StepResult:
        """Execute `plan`; Violation when it breaks a rule of the plan format or reads what was never written."""
        if self._last_plan is not None and plan.plan_id != self._last_plan + 1:
            raise Violation("executor", f"plan {plan.plan_id} follows plan {self._last_plan}")
        self._last_plan = plan.plan_id
        for start in plan.starts:
            self._start(start)
        return StepResult(plan_id=plan.plan_id, rows=tuple([self._run_row(row) for row in plan.rows]))

    def _start(self, start: SlotStart) -> None:
        if not 0 <= start.slot < len(self._slots):
            raise Violation("executor", f"slot {start.slot} does not exist")
        old = self._slots[start.slot]
        if old is not None and old.epoch == start.epoch:
            raise Violation("executor", f"slot {start.slot} gets a new tenant under the old epoch {start.epoch}")
        self._slots[start.slot] = _Slot(
            start.epoch, start.prompt_len, list(start.tokens), start.sampling, start.logprob
        )

    def _run_row(self, row: Row) -> RowResult:
        slot = self._tenant(row)
        if slot.failed:
            return RowResult(slot=row.slot, epoch=row.epoch, error="a row of this slot has failed before")
        tokens = self._inputs(slot, row)
        self._extend_table(slot, row)
        self._compute(slot, row, tokens)
        prompt = self._prompt_logprobs(slot, row)
        if not row.sample:
            return RowResult(slot=row.slot, epoch=row.epoch, prompt=prompt)
        position = row.start + row.length
        if position != len(slot.tokens):
            raise Violation(
                "executor", f"{row} samples position {position} of a slot that knows {len(slot.tokens)} tokens"
            )
        output_len = position - slot.prompt_len
        if self._poison.get(slot.sampling.seed) == output_len:
            slot.failed = True
            return RowResult(slot=row.slot, epoch=row.epoch, error="a logit is not a number")
        total = self._cells.read(slot.table, position)
        token = self.model.sample(total, position, output_len, slot.sampling)
        slot.tokens.append(token)
        output = () if slot.logprob is None else (TokenLogprob(token, -float(position)),)
        ended = grammar_ends(slot.sampling, output_len + 1)
        return RowResult(slot=row.slot, epoch=row.epoch, tokens=(token,), output=output, prompt=prompt, ended=ended)

    def _tenant(self, row: Row) -> _Slot:
        slot = self._slots[row.slot]
        if slot is None or slot.epoch != row.epoch:
            raise Violation("executor", f"{row} refers to a tenant of slot {row.slot} that is not there")
        return slot

    def _inputs(self, slot: _Slot, row: Row) -> list[int]:
        """The input ids of the row, which must be those that the slot knows for these positions."""
        known = slot.tokens[row.start : row.start + row.length]
        if row.length < 1 or len(known) != row.length:
            raise Violation("executor", f"{row} covers positions whose tokens nobody knows")
        if not row.tokens and row.start != len(slot.tokens) - 1:
            raise Violation("executor", f"{row} leaves its token out, but does not stand at the last sampled one")
        if row.tokens and list(row.tokens) != known:
            raise Violation("executor", f"{row} has other tokens than the sequence in its slot: {known}")
        return known

    def _extend_table(self, slot: _Slot, row: Row) -> None:
        if row.pages:
            if row.page_at > len(slot.table):
                raise Violation("executor", f"{row} writes entry {row.page_at} of a table of {len(slot.table)} pages")
            if not all(0 < page < len(self._cells) for page in row.pages):
                raise Violation("executor", f"{row} names a page outside 1 .. {len(self._cells) - 1}")
            slot.table[row.page_at : row.page_at + len(row.pages)] = row.pages
        if len(slot.table) * self._cells.page_size < row.start + row.length:
            raise Violation("executor", f"{row} does not fit in its {len(slot.table)} pages")
        if len(dict.fromkeys(slot.table)) != len(slot.table):
            raise Violation("executor", f"slot {row.slot} has a page twice: {slot.table}")

    def _compute(self, slot: _Slot, row: Row, tokens: list[int]) -> None:
        page_size = self._cells.page_size
        if slot.computed < 0 and row.start % page_size and (self._aligned or row.start != slot.prompt_len):
            raise Violation("executor", f"{row} starts on a cached prefix that is not page aligned")
        if slot.computed >= 0 and row.start != slot.computed:
            raise Violation("executor", f"{row} starts at {row.start}, but {slot.computed} positions are computed")
        total = self._cells.read(slot.table, row.start)
        for position, token in enumerate(tokens, row.start):
            value = cell(total, token)
            self._cells.write(slot.table[position // page_size], position % page_size, value)
            total += value
        slot.computed = row.start + row.length

    def _prompt_logprobs(self, slot: _Slot, row: Row) -> tuple[TokenLogprob, ...]:
        """Entries for the prompt positions whose logits this row makes; the value tells the position: -p."""
        if slot.logprob is None or slot.logprob.start < 0 or row.start >= slot.prompt_len:
            return ()
        first = row.start + 1 if row.start else 0
        last = min(row.start + row.length, slot.prompt_len - 1)
        positions = range(max(first, slot.logprob.start), last + 1)
        return tuple([TokenLogprob(slot.tokens[p], -float(p) if p else None) for p in positions])


@dataclass(slots=True)
class Pipeline:
    """Plans on their way through an executor that takes simulated time and runs one at a time, in order."""

    executor: ChainExecutor
    plan_ns: int  # fixed cost of a plan
    token_ns: int  # cost of a token on top
    _flying: deque[tuple[int, StepPlan]] = field(default_factory=deque)  # (end, plan)

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def plans(self) -> list[StepPlan]:
        """The plans in flight, oldest first."""
        return [plan for _, plan in self._flying]

    @property
    def next_ns(self) -> int | None:
        """When the oldest plan in flight is done."""
        return self._flying[0][0] if self._flying else None

    def submit(self, plan: StepPlan, now_ns: int) -> None:
        begin = max(now_ns, self._flying[-1][0]) if self._flying else now_ns
        self._flying.append((begin + self.plan_ns + plan.num_tokens * self.token_ns, plan))

    def finish(self) -> StepResult:
        """Run the oldest plan in flight."""
        end, plan = self._flying.popleft()
        result = self.executor.run(plan)
        return StepResult(plan_id=result.plan_id, rows=result.rows, forward_ns=end - plan.now_ns)
