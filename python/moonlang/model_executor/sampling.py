"""From the logits of a step to one token per sampling row, with the state that lives in the slots.

Rows are grouped by what they need. A batch of plain greedy rows never comes here with its logits: see `greedy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from moonlang.core.plan import TokenLogprob
from moonlang.core.request import LogprobSpec
from moonlang.layers.token_choice import Choice, Chooser
from moonlang.model_executor.slots import Needs, SlotTable

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

NOT_FINITE = "The model's logits are not finite numbers."
NOTHING_ALLOWED = "No token may follow: the grammar and the other constraints exclude the whole vocabulary."


@dataclass(slots=True)
class Sampled:
    """Outcome of the sampling rows, by their index among the sampling rows. A row in `errors` has no valid token."""

    tokens: list[int]
    output: dict[int, TokenLogprob] = field(default_factory=dict)
    ended: dict[int, bool] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Nothing but a token per row."""
        return not (self.output or self.ended or self.errors)


def greedy(table: SlotTable, slots: Ints, tokens: list[int], broken: list[int]) -> Sampled:
    """Rows that need nothing but the most probable token. broken: the rows whose logits are no finite numbers."""
    table.last_token[slots] = tokens
    return Sampled(tokens, errors=dict.fromkeys(broken, NOT_FINITE))


def sample(table: SlotTable, chooser: Chooser, slots: Ints, positions: Ints, logits: torch.Tensor) -> Sampled:
    """Draw the token at `positions` [N] of the sequences in `slots` [N] from logits [N, V], which are overwritten."""
    needs = table.needs[slots]
    union = int(np.bitwise_or.reduce(needs))
    values: Floats = logits.cpu().numpy()
    if union & Needs.ADJUST:
        for row in np.flatnonzero(needs & Needs.ADJUST).tolist():
            table.adjusters[int(slots[row])].apply(values[row], int(positions[row]), chooser.penalise)
    if union & Needs.GRAMMAR:
        _mask(table, chooser, slots, values)
    tokens, peaks = chooser.choose(values, _choice(table, slots, positions, needs) if union & Needs.DRAW else None)
    errors = _errors(table, slots, peaks, needs, union)
    table.last_token[slots] = tokens
    done = Sampled(tokens.tolist(), errors=errors)
    if union & Needs.LOGPROBS:
        _report(table, chooser, slots, values, needs, done)
    if union & (Needs.ADJUST | Needs.GRAMMAR):
        _accept(table, slots, done)
    return done


def _mask(table: SlotTable, chooser: Chooser, slots: Ints, values: Floats) -> None:
    """Set the logits that a grammar forbids to -inf."""
    vocab = values.shape[1]
    bits = np.zeros((1, -(-vocab // 32)), np.int32)
    for row, slot in enumerate(slots.tolist()):
        matcher = table.matchers.get(slot)
        if matcher is not None and not matcher.ended:
            matcher.fill_bitmask(bits, 0)
            chooser.mask(values[row], bits[0])


def _errors(table: SlotTable, slots: Ints, peaks: Floats, needs: NDArray[np.uint8], union: int) -> dict[int, str]:
    errors: dict[int, str] = {}
    finite = np.isfinite(peaks)
    if not finite.all():
        for row in np.flatnonzero(~finite).tolist():
            constrained = needs[row] & (Needs.ADJUST | Needs.GRAMMAR) and np.isneginf(peaks[row])
            errors[row] = NOTHING_ALLOWED if constrained else NOT_FINITE
    if union & Needs.FAILED:
        for row in np.flatnonzero(needs & Needs.FAILED).tolist():
            errors[row] = table.errors[int(slots[row])]
    return errors


def _choice(table: SlotTable, slots: Ints, positions: Ints, needs: NDArray[np.uint8]) -> Choice:
    """How the slots want their tokens chosen."""
    drawn = (needs & Needs.DRAW) != 0
    return Choice(
        temperature=np.where(drawn, table.temperature[slots], np.float32(0)),
        top_k=table.top_k[slots],
        top_p=table.top_p[slots],
        min_p=table.min_p[slots],
        seeds=table.seed[slots],
        positions=positions,
    )


def _report(
    table: SlotTable, chooser: Chooser, slots: Ints, values: Floats, needs: NDArray[np.uint8], done: Sampled
) -> None:
    """Log probabilities of the sampled tokens, of the distribution after temperature and before the filters."""
    alike: dict[tuple[int, int], list[tuple[int, LogprobSpec]]] = {}  # rows that one call can answer
    for row in np.flatnonzero(needs & Needs.LOGPROBS).tolist():
        tenant = table.tenants[int(slots[row])]
        if row not in done.errors and tenant is not None and tenant.logprob is not None:
            spec = tenant.logprob
            alike.setdefault((len(spec.ids), spec.top), []).append((row, spec))
    for group in alike.values():
        rows, specs = [row for row, _ in group], [spec for _, spec in group]
        logits = values if len(rows) == len(values) else values[rows]
        found = entries(chooser, logits, table.temperature[slots[rows]], [done.tokens[row] for row in rows], specs)
        done.output.update(zip(rows, found, strict=True))


def entries(
    chooser: Chooser, logits: Floats, temperature: Floats, tokens: Sequence[int], specs: Sequence[LogprobSpec]
) -> list[TokenLogprob]:
    """What requests asked to know of a position each, from the logits [N, V] there and the tokens that followed.

    specs: [N], alike in `top` and in the number of ids.
    """
    ids = np.array([(token, *spec.ids) for token, spec in zip(tokens, specs, strict=True)], np.int64)
    found = chooser.log_probabilities(logits, temperature, ids, specs[0].top)
    return [
        TokenLogprob(token, own, tuple(best), tuple(zip(others, spec.ids, strict=True)))
        for token, spec, ((own, *others), best) in zip(tokens, specs, found, strict=True)
    ]


def _accept(table: SlotTable, slots: Ints, done: Sampled) -> None:
    """Tell penalties and grammars what was sampled."""
    for row, slot in enumerate(slots.tolist()):
        if row in done.errors:
            continue
        if (adjuster := table.adjusters.get(slot)) is not None:
            adjuster.accept(done.tokens[row])
        matcher = table.matchers.get(slot)
        if matcher is None or matcher.ended:
            continue  # after its end only rows that were planned too early come here; their results are void
        if not matcher.accept(done.tokens[row]):
            done.errors[row] = f"The grammar refused token {done.tokens[row]} although it had allowed it."
        elif matcher.ended:
            done.ended[row] = True
