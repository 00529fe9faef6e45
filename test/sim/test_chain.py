"""The oracle: tokens that follow from the prompt alone, and change with every cell."""

from __future__ import annotations

import pytest

from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.sim.chain import ChainModel, attend

MODEL = ChainModel(vocab_size=1000, eos_token_ids=(0, 1), eos_per_mille=0)


def first(prompt: list[int], seed: int = 1, count: int = 8) -> list[int]:
    tokens = MODEL.continuation(prompt, SamplingParams(seed=seed))
    return [next(tokens) for _ in range(count)]


def test_one_other_token_anywhere_changes_everything_after_it() -> None:
    prompt = [5, 6, 7, 8, 9]
    for at in range(len(prompt)):
        other = prompt.copy()
        other[at] += 1
        assert first(other) != first(prompt)
    assert first(prompt) == first(prompt)
    assert first(prompt, seed=2) != first(prompt)


def test_a_continuation_goes_on_where_a_longer_prompt_begins() -> None:
    tokens = first([5, 6, 7], count=10)
    assert first([5, 6, 7, *tokens[:4]], count=6) == tokens[4:]


def test_attention_is_chunk_invariant() -> None:
    tokens = list(range(2, 40))
    assert attend(attend(0, tokens[:13]), tokens[13:]) == attend(0, tokens)


@pytest.mark.parametrize(
    ("sampling", "most", "kind", "matched"),
    [
        (SamplingParams(seed=1), 5, "length", None),
        (SamplingParams(seed=1, stop_token_ids=(first([3, 4])[2],)), 9, "stop", first([3, 4])[2]),
        (SamplingParams(seed=1, grammar=GrammarSpec("regex", "4")), 9, "stop", None),
    ],
)
def test_how_an_answer_ends(sampling: SamplingParams, most: int, kind: str, matched: int | None) -> None:
    output, finish = MODEL.answer([3, 4], sampling, most)
    assert output == first([3, 4], count=len(output))
    assert (finish.kind, finish.matched, finish.length) == (kind, matched, len(output))


def test_eos_is_drawn_ignored_and_masked() -> None:
    model = ChainModel(vocab_size=1000, eos_token_ids=(0, 1), eos_per_mille=1000)
    assert model.answer([3], SamplingParams(seed=1), 9)[1].kind == "stop"
    assert len(model.answer([3], SamplingParams(seed=1, ignore_eos=True), 9)[0]) == 9
    output, finish = model.answer([3], SamplingParams(seed=1, min_new_tokens=4), 9)
    assert (len(output), finish.kind) == (5, "stop")
    assert not set(output[:4]) & {0, 1}
