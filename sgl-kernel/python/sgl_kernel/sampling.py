"""From logits [rows, vocab] float32 to tokens and log probabilities. A row's result depends on that row alone."""

from typing import Any

from sgl_kernel import _C


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position` of a sequence sampled with `seed`. Both fit int64."""
    return _C.uniform(seed, position)


def sample(
    logits: Any,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    positions: Any,
    tokens: Any,
    peaks: Any,
) -> None:
    """Write one token per row into `tokens` [rows] int64, and each row's largest logit into `peaks` [rows] float32.

    temperature: [rows] float32, 0 takes the most probable token (the first of equals). top_k: [rows] int64, 0 keeps
    all. top_p: [rows] float64 in (0, 1]. min_p: [rows] float32 in [0, 1]. seeds, positions: [rows] int64. Kept is a
    token whose rank is below top_k, before which less mass than top_p is ranked, and which is at least min_p times as
    probable as the first. Where a peak is not finite (NaN if the row has one) the token means nothing.
    """
    _C.sample(logits, temperature, top_k, top_p, min_p, seeds, positions, tokens, peaks)


def log_probabilities(
    logits: Any, *, temperature: Any, ids: Any, id_values: Any, top_ids: Any, top_values: Any
) -> None:
    """log softmax(logits / temperature) at chosen tokens and of the most probable ones.

    temperature: [rows] float32, above 0. ids: [rows, n] int64 -> id_values: [rows, n] float32. The `top` most probable
    tokens go to top_ids: [rows, top] int32 and top_values: [rows, top] float32, best first, equal ones by id.
    """
    _C.log_probabilities(logits, temperature, ids, id_values, top_ids, top_values)


def apply_bitmask(logits: Any, bits: Any) -> None:
    """Set to -inf the logits of the tokens whose bit is 0. bits: [rows, ceil(vocab / 32)] int32, low bits first."""
    _C.apply_bitmask(logits, bits)


def penalise(
    logits: Any, ids: Any, counts: Any, *, frequency: float = 0.0, presence: float = 0.0, repetition: float = 1.0
) -> None:
    """Penalise in place the distinct tokens `ids` [n] int64 of one row `logits` [vocab] by their `counts` [n] float32.

    Subtracts frequency * count and, where the count is not 0, presence; then divides positive logits by `repetition`
    and multiplies the others by it.
    """
    _C.penalise(logits, ids, counts, frequency, presence, repetition)
