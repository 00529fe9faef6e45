"""Choosing tokens: numpy and, where they are installed, the CPU kernels, with the same outcome."""

import numpy as np
import pytest

from moonlang.config.host import cpu_kernels
from moonlang.core.sampling import SamplingParams
from moonlang.layers.token_choice import Choice, Chooser, NumpyChooser


def kernels() -> Chooser:
    from moonlang.kernels.token_choice import KernelChooser

    return KernelChooser()


CHOOSERS = [
    pytest.param(NumpyChooser, id="numpy"),
    pytest.param(kernels, id="cpu", marks=pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")),
]


@pytest.fixture(params=CHOOSERS)
def chooser(request):
    return request.param()


def choice_for(rows, rng):
    return Choice(
        temperature=rng.choice(np.array([0, 0.5, 1, 2], np.float32), rows),
        top_k=rng.choice([0, 1, 5, 300], rows),
        top_p=rng.choice([1.0, 0.9, 0.3], rows),
        min_p=rng.choice(np.array([0, 0.05], np.float32), rows),
        seeds=rng.integers(-(2**63), 2**63 - 1, rows),
        positions=rng.integers(0, 2**40, rows),
    )


def test_both_choose_the_same(chooser):
    """Rounding may differ at an edge of the cumulative distribution: with 200 rows that is not to be seen."""
    rng = np.random.default_rng(3)
    logits, choice = rng.normal(0, 3, (200, 777)).astype(np.float32), choice_for(200, rng)
    tokens, peaks = chooser.choose(logits, choice)
    expected, _ = NumpyChooser().choose(logits.copy(), choice)
    assert tokens.tolist() == expected.tolist()
    assert peaks.tolist() == logits.max(-1).tolist()
    greedy = choice.temperature == 0
    assert tokens[greedy].tolist() == logits[greedy].argmax(-1).tolist()


def test_without_a_choice_the_first_of_the_largest(chooser):
    logits = np.zeros((3, 200), np.float32)
    logits[1, [7, 90]] = 2
    tokens, peaks = chooser.choose(logits, None)
    assert tokens.tolist() == [0, 7, 0]
    assert peaks.tolist() == [0, 2, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_without_finite_numbers_shows_in_its_peak(chooser, value):
    logits = np.full((2, 150), 1, np.float32)
    logits[0] = value
    for choice in (None, choice_for(2, np.random.default_rng(1))):
        tokens, peaks = chooser.choose(logits, choice)
        assert not np.isfinite(peaks[0])
        assert np.isfinite(peaks[1])
        assert ((tokens >= 0) & (tokens < 150)).all()


def test_mask(chooser):
    logits, bits = np.arange(70, dtype=np.float32), np.array([1, 0, -1], np.int32)
    chooser.mask(logits, bits)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [0, *range(64, 70)]


def test_penalise(chooser):
    logits = np.array([1, -1, 2, 0.5, 3], np.float32)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    chooser.penalise(logits, np.array([0, 1, 3]), np.array([2, 0, 1], np.float32), params)
    assert logits.tolist() == [-0.5, -2, 2, -0.5, 3]


def test_log_probabilities(chooser):
    logits = np.log(np.array([[0.1, 0.4, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]], np.float32))
    first, second = chooser.log_probabilities(logits, np.ones(2, np.float32), np.array([[2, 1, 2], [0, 1, 2]]), 3)
    assert first[0] == pytest.approx(np.log([0.1, 0.4, 0.1]), abs=1e-6)
    assert second[0] == pytest.approx(np.log([0.7, 0.1, 0.1]), abs=1e-6)
    assert [[token for _, token in best] for _, best in (first, second)] == [[1, 3, 0], [0, 1, 2]]
    assert first[1][0][0] == pytest.approx(np.log(0.4), abs=1e-6)
    ((_, sharper),) = chooser.log_probabilities(logits[:1], np.array([0.5], np.float32), np.empty((1, 0), np.int64), 9)
    assert [token for _, token in sharper] == [1, 3, 0, 2]
    assert np.exp([value for value, _ in sharper]).sum() == pytest.approx(1, abs=1e-6)


def test_log_probabilities_of_a_row_do_not_depend_on_the_others(chooser):
    rng = np.random.default_rng(5)
    logits, warm = rng.normal(0, 3, (7, 1000)).astype(np.float32), np.linspace(0.5, 2, 7, dtype=np.float32)
    ids = rng.integers(0, 1000, (7, 2))
    together = chooser.log_probabilities(logits, warm, ids, 4)
    for row in range(7):
        one = slice(row, row + 1)
        assert chooser.log_probabilities(logits[one], warm[one], ids[one], 4) == together[one]
