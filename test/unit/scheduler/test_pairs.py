"""A prefill and a decode scheduler against each other, message by message. Whole histories: the simulator."""

from __future__ import annotations

from typing import Any

import pytest
from pair_bench import MS, PATIENCE_NS, Half, Pair, answer, prompt

from moonlang.core.pairing import Drained, Landed, Noted, Push, Pushed, Refuse, Release, Verify, Want
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.core.ticket import Outcome


def fallback_pair(**fields: Any) -> Pair:
    return Pair(decode=Half("decode", "D1", fallback=True, **fields))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 41])
@pytest.mark.parametrize("chunk", [None, 8, 3])
def test_the_answer_is_that_of_one_server(length: int, chunk: int | None) -> None:
    pair = Pair(prefill=Half("prefill", "P1", chunk_tokens=chunk))
    pair.add("a", prompt(length), room=7, count=6)
    pair.run()
    assert pair.decode.tokens("a") == answer(prompt(length), 6)
    assert pair.decode.end("a") == ("length", 0)
    assert pair.prefill.tokens("a") == answer(prompt(length), 1)
    assert pair.prefill.end("a") == ("length", 0)
    pair.assert_empty()


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 4), (4, 1), (1, 4), (4, 2), (2, 2)])
def test_unequal_tensor_parallelism_moves_every_head_to_its_rank(source: int, target: int) -> None:
    pair = Pair(Half("prefill", "P1", ranks=source, chunk_tokens=8), Half("decode", "D1", ranks=target))
    pair.add("a", prompt(30), room=7, count=6)
    pair.run()
    assert pair.decode.tokens("a") == answer(prompt(30), 6)
    pair.assert_empty()
