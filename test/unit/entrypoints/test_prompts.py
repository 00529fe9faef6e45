"""Bounds that a small model never meets."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine

from moonlang.base.errors import RequestError
from moonlang.entrypoints.prompts import MAX_PROMPT_LOGPROBS, logprob_spec


def test_prompt_logprobs_are_bounded_in_all() -> None:
    with FakeEngine() as engine:
        client = engine.client(vocab_size=50_000)
        fits = MAX_PROMPT_LOGPROBS // 101
        assert logprob_spec(client, fits, start=0, top=60, ids=range(40)).top == 60
        with pytest.raises(RequestError, match="more than 2000000"):
            logprob_spec(client, fits + 1, start=0, top=60, ids=range(40))
        assert logprob_spec(client, 10**6, start=-1, top=1024, ids=()).start == -1  # the output's are not counted
        with pytest.raises(RequestError, match=r"in \[0, 1024\], got 1025"):
            logprob_spec(client, 10, start=-1, top=1025, ids=())
