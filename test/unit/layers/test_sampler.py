"""The sampler against a plain float64 reference, its distribution, and that a row never depends on its neighbours."""

import numpy as np
import pytest

from moonlang.layers import sampler


def reference(logits, temperature, top_k, top_p, min_p):
    """Probabilities [V] after all filters, as the definition says them, in float64."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    kept, before = [], 0.0
    for rank, token in enumerate(order):
        if (top_k and rank >= top_k) or before >= top_p or probs[token] < min_p * probs[order[0]]:
            break
        kept.append(token)
        before += probs[token]
    final = np.zeros_like(probs)
    final[kept] = probs[kept]
    return final / final.sum()


def draw(logits, uniform, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Same parameters for every row."""
    rows = len(logits)
    return sampler.draw(
        logits,
        logits.max(-1),
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, top_k),
        top_p=np.full(rows, top_p),
        min_p=np.full(rows, min_p, np.float32),
        uniform=np.asarray(uniform),
    )


CASES = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("params", CASES, ids=str)
@pytest.mark.parametrize("vocab", [5, 128, 1000])
def test_inverts_the_reference_distribution(params, vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (40, vocab)).astype(np.float32)
    uniform = rng.random(40)
    tokens = draw(logits, uniform, **params)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    for row, token in enumerate(tokens):
        probs = reference(logits[row], **full)
        reach = np.cumsum(probs)
        assert probs[token] > 0
        assert reach[token] - probs[token] - 1e-5 <= uniform[row] <= reach[token] + 1e-5


def test_ties_are_ranked_by_token_id():
    logits = np.zeros((4, 300), np.float32)
    logits[:, 100] = 1.0
    tokens = draw(logits, [0.0, 0.3, 0.9, 1 - 2**-53], top_k=3)
    assert set(tokens.tolist()) <= {0, 1, 100}
    assert tokens[0] == 0
    assert tokens[3] == 100


def test_all_equal_logits_with_top_p_keep_a_share():
    logits = np.zeros((1000, 64), np.float32)
    tokens = draw(logits, np.linspace(0, 1, 1000, endpoint=False), top_p=0.5)
    assert set(tokens.tolist()) == set(range(32))


def test_impossible_tokens_are_never_drawn_at_the_ends():
    logits = np.full((2, 777), -np.inf, np.float32)
    logits[:, 130] = 0.5
    logits[:, 400] = -80.0
    assert draw(logits, [0.0, 1 - 2**-53]).tolist() in ([130, 130], [130, 400])
    logits[:, 400] = 0.5
    assert draw(logits, [0.0, 1 - 2**-53]).tolist() == [130, 400]


def test_extreme_temperatures_do_not_warn():
    logits = np.array([[3e38, -3e38, 0.0]], np.float32)
    assert draw(logits, [0.5], temperature=1e-6).tolist() == [0]
    draw(logits, [0.5], temperature=1e6)


def test_frequencies_follow_the_distribution():
    rng = np.random.default_rng(3)
    logits = np.repeat(rng.normal(0, 1.5, (1, 50)).astype(np.float32), 20_000, axis=0)
    uniform = sampler.uniforms(np.arange(20_000), np.full(20_000, 17))
    tokens = draw(logits, uniform, top_p=0.9)
    expected = reference(logits[0], 1.0, 0, 0.9, 0.0)
    observed = np.bincount(tokens, minlength=50) / 20_000
    assert np.abs(observed - expected).max() < 0.012  # about four standard deviations
    chi_square = (20_000 * (observed - expected) ** 2)[expected > 0] / expected[expected > 0]
    assert chi_square.sum() < 80


def test_uniforms_are_uniform_in_seed_and_in_position():
    for seeds, positions in (
        (np.arange(50_000), np.zeros(50_000, np.int64)),
        (np.full(50_000, -5), np.arange(50_000)),
    ):
        values = sampler.uniforms(seeds, positions)
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, 100, (0, 1))
        assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all()
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    pairs = sampler.uniforms(np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300))
    assert len(np.unique(pairs)) == 90_000


def test_uniforms_never_change():
    """The numbers are part of the contract: a recorded seed must repeat in every later version."""
    values = sampler.uniforms(np.array([0, 1, -1, 2**63 - 1]), np.array([0, 5, 7, 4096]))
    assert (values * 2**53).astype(np.int64).tolist() == PINNED


PINNED = [2537880150861722, 1973613636822190, 7838068388275795, 4745680389705863]


def mixed_parameters(rng, rows):
    return {
        "temperature": rng.choice([0.2, 1.0, 2.5], rows).astype(np.float32),
        "top_k": rng.choice([0, 1, 20, 500], rows),
        "top_p": rng.choice([1.0, 0.95, 0.3], rows),
        "min_p": rng.choice([0.0, 0.05], rows).astype(np.float32),
        "uniform": rng.random(rows),
    }


@pytest.mark.parametrize("vocab", [1, 31, 1024, 5003])
def test_a_row_does_not_depend_on_its_batch(vocab):
    """Tokens and log probabilities of a row are the same bits alone, in any batch and at any place in it."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 2, (33, vocab)).astype(np.float32)
    params = mixed_parameters(rng, 33)
    together = sampler.draw(logits, logits.max(-1), **params)
    logprobs = sampler.log_softmax(logits, params["temperature"])
    for size in (1, 2, 7, 32):
        picked = rng.permutation(33)[:size]
        part = logits[picked]
        alone = sampler.draw(part, part.max(-1), **{name: values[picked] for name, values in params.items()})
        assert (alone == together[picked]).all()
        assert (sampler.log_softmax(part, params["temperature"][picked]) == logprobs[picked]).all()


def test_log_softmax_and_best():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (6, 999)).astype(np.float32)
    logits[2, 10:20] = -np.inf
    temperature = np.array([1, 0.5, 2, 1, 1, 1], np.float32)
    got = sampler.log_softmax(logits, temperature)
    scaled = logits.astype(np.float64) / temperature[:, None]
    want = (
        scaled
        - np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - scaled.max(-1, keepdims=True)
    )
    finite = np.isfinite(want)
    assert np.abs(got[finite] - want[finite]).max() < 1e-5
    assert (np.isneginf(got) == ~finite).all()
    for count in (0, 1, 5, 999, 2000):
        expected = sorted(((-value, token) for token, value in enumerate(got[1].tolist())))[:count]
        assert sampler.best(got[1], count) == [(-value, token) for value, token in expected]


def test_best_breaks_ties_by_token_id():
    assert sampler.best(np.array([0, 1, 0, 1, 0], np.float32), 3) == [(1.0, 1), (1.0, 3), (0.0, 0)]
