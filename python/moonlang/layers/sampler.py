"""Drawing tokens: a sample is a function of (logits, parameters, seed, position) and of nothing else.

Numpy reductions run along the last, contiguous axis only, so the value of a row does not depend on the other rows. The
uniform number of a sample is a hash of the request's seed and the position of the token in its sequence, so a request
repeats exactly whatever else runs in the batch.

The order of filters is SGLang's: softmax, top_k, top_p, min_p. All three look at the unfiltered distribution ("joint"
filtering): a token stays when its rank is below top_k, the mass of the tokens ranked before it is below top_p, and its
probability is at least min_p times the largest. Equal probabilities are ranked by token id.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_BLOCK = 128  # tokens whose mass is summed in one go; numpy's pairwise sum takes 128 numbers without a split


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Ints, positions: Ints) -> NDArray[np.float64]:
    """One number in [0, 1) per row, a hash of (seed, position). seeds, positions: [N] int64."""
    stream = _mix(seeds.view(np.uint64) + _GOLDEN)
    bits = _mix(stream + positions.view(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    logits: Floats,
    peaks: Floats,
    *,
    temperature: Floats,
    top_k: Ints,
    top_p: NDArray[np.float64],
    min_p: Floats,
    uniform: NDArray[np.float64],
) -> Ints:
    """Sample one token per row by inverting the cumulative distribution of the kept tokens in vocabulary order.

    logits: [N, V], after penalties, bias and masks; peaks: [N], their row maxima, all finite. temperature: [N], > 0.
    top_k: [N], 0 keeps all. top_p: [N] in (0, 1]. min_p: [N] in [0, 1]. uniform: [N] in [0, 1). Returns [N] int64.
    """
    weights = _weights(logits, peaks, temperature)
    vocab = logits.shape[1]
    narrow = ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0)
    for row in np.flatnonzero(narrow):
        _keep_best(weights[row, :vocab], int(top_k[row]), float(top_p[row]))
    floor = np.flatnonzero(min_p > 0.0)
    if floor.size:
        part = weights[floor]
        part[part < min_p[floor, None]] = 0.0  # the largest weight is 1
        weights[floor] = part
    return _invert(weights, uniform)


def _weights(logits: Floats, peaks: Floats, temperature: Floats) -> Floats:
    """exp((logit - peak) / temperature), padded with zeros to whole blocks: [N, ceil(V / BLOCK) * BLOCK], largest 1."""
    rows, vocab = logits.shape
    weights = np.empty((rows, -(-vocab // _BLOCK) * _BLOCK), np.float32)
    weights[:, vocab:] = 0.0
    body = weights[:, :vocab]
    with np.errstate(over="ignore"):  # a hopeless token over a tiny temperature is -inf, as it should be
        np.subtract(logits, peaks[:, None], out=body)
        np.divide(body, temperature[:, None], out=body)
    np.exp(body, out=body)
    return weights


def _keep_best(weights: Floats, top_k: int, top_p: float) -> None:
    """Zero the weights [V] of one row that top_k or top_p drop."""
    vocab = weights.shape[0]
    keep = top_k if 0 < top_k < vocab else vocab
    if top_p >= 1.0:
        cut = np.partition(weights, vocab - keep)[vocab - keep]
    else:
        total = float(weights.sum(dtype=np.float64))
        if keep < vocab:
            likely = np.partition(weights, vocab - keep)[vocab - keep :]
        else:
            # Tokens below this share hold less than 1 - top_p together, so the nucleus lies among the others.
            likely = weights[weights >= total * (1.0 - top_p) / vocab]
        ranked = -np.sort(-likely)
        before = np.cumsum(ranked, dtype=np.float64) - ranked
        keep = int(np.count_nonzero(before < top_p * total))
        cut = ranked[keep - 1]
    surplus = keep - int(np.count_nonzero(weights > cut))
    ties = np.flatnonzero(weights == cut)
    weights[weights < cut] = 0.0
    weights[ties[surplus:]] = 0.0


def _invert(weights: Floats, uniform: NDArray[np.float64]) -> Ints:
    """The first token whose cumulative weight exceeds uniform * total, searched by block and then inside the block."""
    rows = weights.shape[0]
    blocks = weights.reshape(rows, -1, _BLOCK)
    mass = np.cumsum(blocks.sum(axis=-1), axis=-1, dtype=np.float64)
    target = uniform * mass[:, -1]
    # Rounding may put the target at the total: the last block with any weight is as far as a sample can lie.
    last = np.count_nonzero(mass < mass[:, -1:], axis=-1)
    block = np.minimum(np.count_nonzero(mass <= target[:, None], axis=-1), last)
    each = np.arange(rows)
    rest = target - np.where(block > 0, mass[each, block - 1], 0.0)
    inside = blocks[each, block]
    reach = np.cumsum(inside, axis=-1, dtype=np.float64)
    last = np.count_nonzero(reach < reach[:, -1:], axis=-1)
    return block * _BLOCK + np.minimum(np.count_nonzero(reach <= rest[:, None], axis=-1), last)


def log_softmax(logits: Floats, temperature: Floats | None = None) -> Floats:
    """Natural log of the probabilities, [N, V]. temperature: [N] or None for 1. -inf stays -inf."""
    scaled = logits if temperature is None else logits / temperature[:, None]
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64, keepdims=True)).astype(np.float32)


def best(logprobs: Floats, count: int) -> list[tuple[float, int]]:
    """The `count` most probable tokens of one row [V] as (logprob, token), best first, equal ones by token id."""
    count = min(count, logprobs.shape[0])
    if count == 0:
        return []
    cut = np.partition(logprobs, logprobs.shape[0] - count)[logprobs.shape[0] - count]
    above = np.flatnonzero(logprobs > cut)
    chosen = np.concatenate([above, np.flatnonzero(logprobs == cut)[: count - above.size]])
    chosen = chosen[np.lexsort((chosen, -logprobs[chosen]))]
    return list(zip(logprobs[chosen].tolist(), chosen.tolist(), strict=True))
