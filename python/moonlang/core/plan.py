"""What the brain tells the muscle, and what comes back: plain integers both ways.

A plan is complete in itself together with the plans before it: rank 0 sends the same bytes to every worker, and a
recorded list of plans replays a run. The executor keeps, per slot, the page table, the sampling state and the last
sampled token; a plan only carries what changed.
"""

from __future__ import annotations

import msgspec

from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams


class SlotStart(msgspec.Struct, frozen=True, array_like=True):
    """A slot gets a new tenant. `tokens` is prompt plus output known so far (a retracted request comes with output),
    `prompt_len` says where output begins. Resets all state the executor holds for the slot."""

    slot: int
    epoch: int
    prompt_len: int
    tokens: tuple[int, ...]
    sampling: SamplingParams
    logprob: LogprobSpec | None = None


class Row(msgspec.Struct, frozen=True, array_like=True):
    """Positions [start, start + length) of one slot, to be computed by this plan.

    tokens: the input ids of those positions, or () for a decode row whose one input id is the slot's last sampled token
    (it may still be in flight when the plan is made). pages: page ids to write into the slot's page table from entry
    `page_at` on, before the row runs. sample: draw the next token from the logits of the last position.
    """

    slot: int
    epoch: int
    start: int
    length: int
    tokens: tuple[int, ...]
    sample: bool
    page_at: int = 0
    pages: tuple[int, ...] = ()


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One forward of the model. Decode rows come first, then prefill rows; at most one row per slot.

    starts are applied before the rows. Plans are executed strictly in the order of plan_id. report_layers: the executor
    says how far it is (`Executor.progress`) whenever so many more layers have written their KV; 0: never. era: how
    often the memory had been lost when it was made (see `StepResult.lost`).
    """

    plan_id: int
    now_ns: int
    starts: tuple[SlotStart, ...]
    rows: tuple[Row, ...]
    report_layers: int = 0
    era: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.length for row in self.rows)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token at one position, with the alternatives asked for. None: first prompt position."""

    token: int
    logprob: float | None
    top: tuple[tuple[float, int], ...] = ()  # (logprob, token id), best first
    ids: tuple[tuple[float, int], ...] = ()  # in the order of LogprobSpec.ids


class RowResult(msgspec.Struct, frozen=True, array_like=True):
    """Outcome of one row. tokens: sampled ids (none when the row did not sample; several with speculation).

    output: one entry per sampled token when logprobs were asked for. prompt: entries for the prompt positions that this
    row covered, counted from LogprobSpec.start: the entry of position p is computed from the logits of position p - 1.
    ended: the grammar is complete, the sequence ends with these tokens. error: the row failed (for instance a logit was
    not a number); the request is aborted with this text.
    """

    slot: int
    epoch: int
    tokens: tuple[int, ...] = ()
    output: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    ended: bool = False
    error: str = ""


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """Results of plan `plan_id`, one per row in the order of its rows. forward_ns: time the executor spent on it.

    lost: the executor has lost its memory, with all that was ever computed; neither this plan nor any other of its era
    has been or will be carried out, and there are no rows.
    """

    plan_id: int
    rows: tuple[RowResult, ...]
    forward_ns: int = 0
    lost: bool = False
