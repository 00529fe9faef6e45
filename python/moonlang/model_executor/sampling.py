"""From the logits of a step to one token per sampling row, with the state that lives in the slots.

Rows are grouped by what they need: a batch of plain greedy rows costs one argmax.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from moonlang.core.plan import TokenLogprob
from moonlang.core.request import LogprobSpec
from moonlang.layers import sampler
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


def sample(table: SlotTable, slots: Ints, positions: Ints, logits: torch.Tensor) -> Sampled:
    """Draw the token at `positions` [N] of the sequences in `slots` [N] from logits [N, V], which are overwritten."""
    needs = table.needs[slots]
    union = int(np.bitwise_or.reduce(needs))
    if union == Needs.NOTHING and logits.device.type != "cpu":
        return _argmax_on_device(table, slots, logits)
    values: Floats = logits.cpu().numpy()
    if union & Needs.ADJUST:
        for row in np.flatnonzero(needs & Needs.ADJUST).tolist():
            table.adjusters[int(slots[row])].apply(values[row], int(positions[row]))
    if union & Needs.GRAMMAR:
        _mask(table, slots, values)
    tokens = values.argmax(axis=-1)
    peaks = values[np.arange(len(slots)), tokens]
    errors = _errors(table, slots, peaks, needs, union)
    if union & Needs.DRAW:
        _draw(table, slots, positions, values, peaks, tokens, np.flatnonzero((needs & Needs.DRAW) & np.isfinite(peaks)))
    table.last_token[slots] = tokens
    done = Sampled(tokens.tolist(), errors=errors)
    if union & Needs.LOGPROBS:
        _report(table, slots, values, needs, done)
    if union & (Needs.ADJUST | Needs.GRAMMAR):
        _accept(table, slots, done)
    return done


def _argmax_on_device(table: SlotTable, slots: Ints, logits: torch.Tensor) -> Sampled:
    """The short path of an accelerator: only the winners travel."""
    best, index = logits.max(dim=-1)
    tokens, peaks = index.cpu().numpy(), best.cpu().numpy()
    table.last_token[slots] = tokens
    return Sampled(tokens.tolist(), errors=dict.fromkeys(np.flatnonzero(~np.isfinite(peaks)).tolist(), NOT_FINITE))


def _mask(table: SlotTable, slots: Ints, values: Floats) -> None:
    """Set the logits that a grammar forbids to -inf."""
    vocab = values.shape[1]
    bits = np.zeros((1, -(-vocab // 32)), np.int32)
    for row, slot in enumerate(slots.tolist()):
        matcher = table.matchers.get(slot)
        if matcher is not None and not matcher.ended:
            matcher.fill_bitmask(bits, 0)
            allowed = np.unpackbits(bits.view(np.uint8)[0], count=vocab, bitorder="little")
            np.copyto(values[row], -np.inf, where=allowed == 0)


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


def _draw(
    table: SlotTable, slots: Ints, positions: Ints, values: Floats, peaks: Floats, tokens: Ints, rows: Ints
) -> None:
    """Replace the argmax by a sample in `rows`."""
    if rows.size == 0:
        return
    chosen = slots[rows]
    tokens[rows] = sampler.draw(
        values if rows.size == len(slots) else values[rows],
        peaks[rows],
        temperature=table.temperature[chosen],
        top_k=table.top_k[chosen],
        top_p=table.top_p[chosen],
        min_p=table.min_p[chosen],
        uniform=sampler.uniforms(table.seed[chosen], positions[rows]),
    )


def _report(table: SlotTable, slots: Ints, values: Floats, needs: NDArray[np.uint8], done: Sampled) -> None:
    """Log probabilities of the sampled tokens, of the distribution after temperature and before the filters."""
    for row in np.flatnonzero(needs & Needs.LOGPROBS).tolist():
        tenant = table.tenants[int(slots[row])]
        if row in done.errors or tenant is None or tenant.logprob is None:
            continue
        logprobs = sampler.log_softmax(values[row : row + 1], table.temperature[slots[row : row + 1]])
        done.output[row] = entry(logprobs[0], done.tokens[row], tenant.logprob)


def entry(logprobs: Floats, token: int, spec: LogprobSpec) -> TokenLogprob:
    """What a request asked to know of one position, from the log probabilities [V] there."""
    return TokenLogprob(
        token,
        float(logprobs[token]),
        tuple(sampler.best(logprobs, spec.top)),
        tuple((float(logprobs[other]), other) for other in spec.ids),
    )


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
