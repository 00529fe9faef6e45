"""Penalties, bias and held-back end tokens against the formulas written out over the whole vocabulary."""

import numpy as np
import pytest

from moonlang.core.sampling import SamplingParams
from moonlang.layers.penalties import Adjuster, penalise

VOCAB = 400


def reference(logits, params, tokens, prompt_len):
    counts = np.bincount(np.array(tokens[prompt_len:], np.int64), minlength=VOCAB)
    present = np.bincount(np.array(tokens, np.int64), minlength=VOCAB) > 0
    out = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    scaled = np.where(out > 0, out / params.repetition_penalty, out * params.repetition_penalty)
    out = np.where(present, scaled, out)
    for token, bias in params.logit_bias.items():
        out[token] += bias
    return out


PARAMS = [
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(presence_penalty=-1.3),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(repetition_penalty=0.6, frequency_penalty=2.0, presence_penalty=0.5),
    SamplingParams(logit_bias={3: 5.0, 399: -100.0}),
    SamplingParams(frequency_penalty=-2.0, repetition_penalty=1.1, logit_bias={0: 1.0}),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("known_output", [0, 1, 200])
def test_follows_the_formulas_while_tokens_arrive(params, known_output):
    rng = np.random.default_rng(known_output)
    tokens = rng.integers(0, VOCAB, 50 + known_output).tolist()
    adjuster = Adjuster(params, tokens, 50, (), VOCAB)
    for _ in range(100):
        logits = rng.normal(0, 3, VOCAB).astype(np.float32)
        want = reference(logits, params, tokens, 50)
        adjuster.apply(logits, len(tokens), penalise)
        assert np.abs(logits - want).max() < 1e-4
        tokens.append(int(rng.integers(0, VOCAB)))
        adjuster.accept(tokens[-1])


def test_a_retracted_request_continues_as_if_nothing_had_happened():
    rng = np.random.default_rng(1)
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1)
    tokens = rng.integers(0, VOCAB, 120).tolist()
    through = Adjuster(params, tokens[:40], 40, (), VOCAB)
    for token in tokens[40:]:
        through.accept(token)
    again = Adjuster(params, tokens, 40, (), VOCAB)
    logits = rng.normal(0, 3, VOCAB).astype(np.float32)
    other = logits.copy()
    through.apply(logits, 120, penalise)
    again.apply(other, 120, penalise)
    assert (logits == other).all()


def test_end_tokens_are_held_back_until_the_minimum():
    params = SamplingParams(min_new_tokens=3, logit_bias={7: 2.0})
    adjuster = Adjuster(params, list(range(10)), 10, (7, 9, VOCAB + 5), VOCAB)
    for position, held in ((10, True), (12, True), (13, False), (40, False)):
        logits = np.zeros(VOCAB, np.float32)
        adjuster.apply(logits, position, penalise)
        assert np.isneginf(logits[[7, 9]]).all() == held
        assert np.isneginf(logits).sum() == (2 if held else 0)


def test_who_needs_an_adjuster():
    assert not Adjuster.needed(SamplingParams())
    assert not Adjuster.needed(SamplingParams(temperature=0.5, top_k=3))
    assert Adjuster.needed(SamplingParams(min_new_tokens=1))
    assert all(Adjuster.needed(params) for params in PARAMS)
