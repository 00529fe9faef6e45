"""Log probabilities of prompt tokens, computed only where a request asked and in slices of bounded size."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from moonlang.core.plan import Row, TokenLogprob
from moonlang.layers.token_choice import Chooser
from moonlang.model_executor.sampling import entries
from moonlang.model_executor.slots import SlotTable

_SLICE_VALUES = 1 << 22  # logits computed at once


class _Hidden(Protocol):
    def logits(self, begin: int, end: int) -> torch.Tensor: ...


class Part(NamedTuple):
    """The kept tokens of one row: those from `first` on."""

    hidden: _Hidden
    first: int

    def logits(self, begin: int, end: int) -> torch.Tensor:
        """[end - begin, V] of the row's tokens [begin, end)."""
        return self.hidden.logits(self.first + begin, self.first + end)


def report(table: SlotTable, chooser: Chooser, row: Row, part: Part, vocab_size: int) -> tuple[TokenLogprob, ...]:
    """Entries for the prompt positions this row reaches. part: all tokens of the row.

    The entry of position p comes from the raw logits of p - 1. A position whose predecessor was not computed (the
    first of the prompt, or the first after a cached prefix) has the logprob None.
    """
    tenant, first = table.tenants[row.slot], table.next_prompt[row.slot]
    if tenant is None or tenant.logprob is None:
        return ()
    stop = min(row.start + row.length + 1, tenant.prompt_len)
    if first >= stop:
        return ()
    if stop < tenant.prompt_len:
        table.next_prompt[row.slot] = stop
    else:
        del table.next_prompt[row.slot]
    unknown = min(max(row.start + 1, first), stop)
    found = [TokenLogprob(tenant.tokens[position], None) for position in range(first, unknown)]
    known = range(unknown, stop)
    step = max(1, _SLICE_VALUES // vocab_size)
    for at in range(0, len(known), step):
        positions = known[at : at + step]
        begin = positions[0] - 1 - row.start
        logits = part.logits(begin, begin + len(positions)).cpu().numpy()
        tokens = [tenant.tokens[position] for position in positions]
        ones = np.ones(len(positions), np.float32)
        found += entries(chooser, logits, ones, tokens, [tenant.logprob] * len(positions))
    return tuple(found)
