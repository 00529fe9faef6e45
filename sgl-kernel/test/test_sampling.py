"""Sampling and log probabilities against a float64 oracle that sorts, and against their own statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from sgl_kernel import sampling

VOCABS = [1, 2, 127, 128, 129, 1000, 32_003]
SLACK = 1e-5  # of the mass: where float32 may decide otherwise than float64


@dataclass
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


FILTERS = [
    Params(),
    Params(temperature=0.0),
    Params(temperature=0.3, top_k=5),
    Params(top_k=1),
    Params(temperature=1.5, top_p=0.9),
    Params(top_p=0.05),
    Params(top_p=1e-9),
    Params(min_p=0.1),
    Params(temperature=0.7, top_k=50, top_p=0.8, min_p=0.01),
    Params(temperature=2.0, top_k=700, top_p=0.999),
    Params(temperature=1e-40),
]


def draw(
    logits: torch.Tensor, params: list[Params], seeds: list[int], position: int = 3
) -> tuple[list[int], list[float]]:
    n = len(logits)
    dtypes = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float32}
    columns = {f.name: torch.tensor([getattr(p, f.name) for p in params], dtype=dtypes[f.name]) for f in fields(Params)}
    tokens, peaks = torch.full((n,), -7), torch.full((n,), math.nan)
    sampling.sample(
        logits, seeds=torch.tensor(seeds), positions=torch.full((n,), position), tokens=tokens, peaks=peaks, **columns
    )
    return tokens.tolist(), peaks.tolist()


def acceptable(logits: torch.Tensor, p: Params, uniform: float) -> set[int]:
    """The tokens that the definition allows, give or take rounding at the edges of nucleus and cumulative mass."""
    x = logits.double().numpy()
    if p.temperature == 0.0:
        return {int(x.argmax())}
    with np.errstate(over="ignore"):
        weights = np.exp((x - x.max()) / np.float32(p.temperature).astype(np.float64))
    total = weights.sum()
    order = np.lexsort((np.arange(len(x)), -x))
    before = np.cumsum(weights[order]) - weights[order]
    found = set()
    for edge in (-SLACK, 0.0, SLACK):
        keep = before < (p.top_p * (1 + edge)) * total if p.top_p < 1 else np.ones(len(x), bool)
        keep[0] = True
        keep[p.top_k or len(x) :] = False
        kept = np.zeros(len(x), bool)
        kept[order[keep]] = True
        kept &= weights >= p.min_p * (1 + edge)
        reach = np.cumsum(np.where(kept, weights, 0.0))
        for u in (uniform * (1 - SLACK) - 1e-12, uniform, uniform * (1 + SLACK)):
            at = min(np.searchsorted(reach, u * reach[-1], side="right"), int(np.flatnonzero(kept & (weights > 0))[-1]))
            found.add(int(at))
    return found


def rows_of(kind: str, n: int, vocab: int) -> torch.Tensor:
    """normal: distinct numbers; coarse: many ties; flat: nothing but ties; masked: most are -inf."""
    logits = torch.randn(n, vocab) * 3
    if kind == "coarse":
        logits = logits.round()
    elif kind == "flat":
        logits.zero_()
    elif kind == "masked":
        logits[torch.rand(n, vocab) < 0.95] = -math.inf
        logits[:, vocab // 2] = 1.0
    return logits


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["normal", "coarse", "flat", "masked"])
def test_against_the_definition(vocab: int, kind: str) -> None:
    logits = rows_of(kind, len(FILTERS), vocab)
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(FILTERS),)).tolist()
    tokens, peaks = draw(logits, FILTERS, seeds)
    assert peaks == logits.max(-1).values.tolist()
    for row, params in enumerate(FILTERS):
        allowed = acceptable(logits[row], params, sampling.uniform(seeds[row], 3))
        assert tokens[row] in allowed, (params, tokens[row], allowed)


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.0, 0.5]).expand(4000, -1)
    tokens, _ = draw(logits, [Params(top_k=3)] * 4000, list(range(4000)))
    counts = np.bincount(tokens, minlength=5)
    expected = np.exp([1.0, -np.inf, -np.inf, 2.0, 0.5])
    expected *= 4000 / expected.sum()
    assert counts[1] == counts[2] == 0
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected + 1e-9) + 1e-9).all(), (counts, expected)


def test_uniform_is_that_of_the_reference() -> None:
    """Values computed with arbitrary precision integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for seed, position in ((0, 0), (1, 2), (-1, 5), (2**63 - 1, 2**40), (-(2**63), 7)):
        stream = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
        bits = mix((stream + position * 0x9E3779B97F4A7C15) % 2**64)
        assert sampling.uniform(seed, position) == (bits >> 11) * 2.0**-53


def test_a_row_is_alone() -> None:
    logits = rows_of("normal", 33, 5000)
    params = [FILTERS[i % len(FILTERS)] for i in range(33)]
    together, _ = draw(logits, params, list(range(33)))
    alone = [draw(logits[i : i + 1], [params[i]], [i])[0][0] for i in range(33)]
    assert together == alone


@pytest.mark.parametrize("vocab", [1, 130, 999])
def test_a_row_without_a_number(vocab: int) -> None:
    logits = torch.randn(3, vocab)
    logits[0] = -math.inf
    logits[1, vocab // 2] = math.nan
    logits[2, vocab // 3] = math.inf
    _, peaks = draw(logits, [Params()] * 3, [0, 1, 2])
    assert peaks[0] == -math.inf
    assert math.isnan(peaks[1])
    assert peaks[2] == math.inf


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["normal", "coarse", "flat", "masked"])
@pytest.mark.parametrize("top", [0, 1, 5, 999])
def test_log_probabilities(vocab: int, kind: str, top: int) -> None:
    top, logits = min(top, vocab), rows_of(kind, 4, vocab)
    temperature, ids = torch.tensor([1.0, 0.5, 2.0, 0.01]), torch.randint(vocab, (4, 3))
    values, top_ids, top_values = torch.zeros(4, 3), torch.zeros(4, top, dtype=torch.int32), torch.zeros(4, top)
    sampling.log_probabilities(
        logits, temperature=temperature, ids=ids, id_values=values, top_ids=top_ids, top_values=top_values
    )
    expected = (logits.double() / temperature[:, None].double()).log_softmax(-1)
    # A quotient of logit and temperature is rounded to float32: half a unit in the last place of the largest.
    largest = (logits.masked_fill(logits.isinf(), 0.0).abs().amax(-1) / temperature).tolist()
    for row in range(4):
        order = np.lexsort((np.arange(vocab), -logits[row].numpy()))[:top]
        near = {"rtol": 3e-6, "atol": 3e-6 + 2e-7 * largest[row]}
        torch.testing.assert_close(values[row].double(), expected[row][ids[row]], **near)
        torch.testing.assert_close(top_values[row].double(), expected[row][order], **near)
        # Logits that differ in the last bits may have equal log probabilities, and these go by id.
        ranked = list(zip((-top_values[row]).tolist(), top_ids[row].tolist(), strict=True))
        assert ranked == sorted(set(ranked))
        if kind != "normal":
            assert top_ids[row].tolist() == order.tolist()


def test_bitmask() -> None:
    for vocab in (1, 31, 32, 33, 1000):
        logits, words = torch.randn(3, vocab), -(-vocab // 32)
        bits = torch.randint(-(2**31), 2**31 - 1, (3, words), dtype=torch.int32)
        bits[0, 0], bits[1, -1] = 0, -1
        allowed = torch.tensor(np.unpackbits(bits.numpy().view(np.uint8), axis=1, bitorder="little")[:, :vocab]).bool()
        expected = logits.masked_fill(~allowed, -math.inf)
        sampling.apply_bitmask(logits, bits)
        assert torch.equal(logits, expected)


def test_penalties() -> None:
    logits = torch.randn(500)
    ids, counts = torch.randperm(500)[:60], torch.randint(0, 4, (60,)).float()
    expected = logits.clone()
    values = expected[ids] - 0.3 * counts - 0.7 * (counts > 0)
    expected[ids] = torch.where(values > 0, values / 1.3, values * 1.3)
    sampling.penalise(logits, ids, counts, frequency=0.3, presence=0.7, repetition=1.3)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected float32"):
        sampling.apply_bitmask(torch.zeros(1, 40).half(), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="bits"):
        sampling.apply_bitmask(torch.zeros(1, 40), torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        sampling.penalise(torch.zeros(4), torch.tensor([4]), torch.ones(1))
