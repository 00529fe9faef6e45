"""What the executor remembers of each slot between plans, as arrays indexed by slot.

A plan carries only changes; page tables, sampling parameters, the last sampled token, penalty counts and grammar state
stay here. `S` slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from moonlang.base.errors import BugError
from moonlang.core.plan import Row, SlotStart
from moonlang.core.ports import GrammarEngine, GrammarMatcher
from moonlang.core.sampling import GREEDY_BELOW
from moonlang.layers.penalties import Adjuster


class Needs(IntFlag):
    """What a slot's logits need beyond argmax. A batch in which no slot needs anything takes the short path."""

    NOTHING = 0
    DRAW = 1  # temperature above zero
    ADJUST = 2  # penalties, logit_bias, min_new_tokens
    GRAMMAR = 4
    LOGPROBS = 8
    FAILED = 16  # the tenant cannot be served; `SlotTable.errors` says why


class SlotTable:
    """State of all slots. Written by `start` and `assign_pages`; the runner records sampled tokens in `last_token`.

    page_table: [S + 1, Pmax] int32; the last row belongs to no slot and names page 0, which is nobody's.
    next_prompt: by slot, the next prompt position whose log probability is to be reported; gone when all are.
    """

    def __init__(
        self,
        num_slots: int,
        max_pages: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        grammars: GrammarEngine | None,
    ) -> None:
        self.page_table = np.zeros((num_slots + 1, max_pages), np.int32)
        self.last_token = np.zeros(num_slots, np.int64)
        self.needs = np.zeros(num_slots, np.uint8)
        self.temperature = np.ones(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float64)
        self.min_p = np.zeros(num_slots, np.float32)
        self.seed = np.zeros(num_slots, np.int64)
        self.tenants: list[SlotStart | None] = [None] * num_slots
        self.adjusters: dict[int, Adjuster] = {}
        self.matchers: dict[int, GrammarMatcher] = {}
        self.next_prompt: dict[int, int] = {}
        self.errors: dict[int, str] = {}
        self._epochs = [-1] * num_slots
        self._pages_known = [0] * num_slots
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._grammars = grammars

    def start(self, tenant: SlotStart) -> None:
        """Forget the slot's former tenant and take over the new one."""
        slot, params = tenant.slot, tenant.sampling
        self.page_table[slot, : self._pages_known[slot]] = 0
        self._pages_known[slot] = 0
        for state in (self.adjusters, self.matchers, self.next_prompt, self.errors):
            state.pop(slot, None)
        self.tenants[slot] = tenant
        self._epochs[slot] = tenant.epoch
        self.last_token[slot] = tenant.tokens[-1]
        self.temperature[slot] = params.temperature if params.temperature >= GREEDY_BELOW else 1.0
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = params.seed
        self.needs[slot] = self._needs(tenant)

    def greedy(self, slots: NDArray[np.int64]) -> bool:
        """Whether these slots need nothing but the most probable token."""
        return not self.needs[slots].any()

    def _needs(self, tenant: SlotStart) -> int:
        slot, params = tenant.slot, tenant.sampling
        needs = Needs.NOTHING if params.greedy else Needs.DRAW
        if Adjuster.needed(params):
            needs |= Needs.ADJUST
            ends = (*self._eos, *params.stop_token_ids)
            self.adjusters[slot] = Adjuster(params, tenant.tokens, tenant.prompt_len, ends, self._vocab_size)
        if params.grammar is not None:
            needs |= Needs.GRAMMAR
            needs |= self._start_grammar(tenant)
        if tenant.logprob is not None:
            needs |= Needs.LOGPROBS
            if 0 <= tenant.logprob.start < tenant.prompt_len:
                self.next_prompt[slot] = tenant.logprob.start
        return int(needs)

    def _start_grammar(self, tenant: SlotStart) -> Needs:
        """Give the slot a matcher that has seen the output so far; FAILED when that cannot be."""
        if self._grammars is None or tenant.sampling.grammar is None:
            self.errors[tenant.slot] = "Grammars are off: the server runs with --grammar-backend none."
            return Needs.FAILED
        matcher = self._grammars.matcher(tenant.sampling.grammar)
        for token in tenant.tokens[tenant.prompt_len :]:
            if not matcher.accept(token):
                self.errors[tenant.slot] = f"The grammar does not allow token {token} of the output so far."
                return Needs.FAILED
        self.matchers[tenant.slot] = matcher
        return Needs.NOTHING

    def assign_pages(self, rows: Sequence[Row]) -> None:
        """Write the page ids that rows bring into their slots' page tables. BugError for a row of another tenant."""
        for row in rows:
            if row.epoch != self._epochs[row.slot]:
                raise BugError(f"Slot {row.slot} is at epoch {self._epochs[row.slot]}, its row at {row.epoch}.")
            if row.pages:
                end = row.page_at + len(row.pages)
                self.page_table[row.slot, row.page_at : end] = row.pages
                self._pages_known[row.slot] = max(self._pages_known[row.slot], end)
