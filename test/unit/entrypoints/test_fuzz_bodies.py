"""Every field of every body with every kind of nonsense: a clear 4xx or a good answer, never a 500."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from fake_app import Served, run_served

from moonlang.core.sampling_parse import NAMES
from moonlang.entrypoints.admin import AbortBody
from moonlang.entrypoints.generation import GenerateBody
from moonlang.entrypoints.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

NONSENSE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, -0.0, 1e308),
    *("", "x", "\0", "\ud7ff", "5", "é" * 300, [], [None], [[]], [[[]]], ["a", 1], [True], [10**400], {}, {"a": None}),
    *({"": {"": []}}, {"type": 5}, {"type": "json_schema", "json_schema": 5}, [{"role": "user"}], {"5": "x"}),
)
BODIES: tuple[tuple[str, type[msgspec.Struct], dict[str, Any]], ...] = (
    ("/generate", GenerateBody, {"text": "a"}),
    ("/generate", GenerateBody, {"text": ["a", "b"], "return_logprob": True, "stream": True}),
    ("/v1/completions", CompletionRequest, {"prompt": "a"}),
    ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/tokenize", TokenizeRequest, {"prompt": "a"}),
    ("/v1/detokenize", DetokenizeRequest, {"tokens": [97]}),
    ("/abort_request", AbortBody, {"rid": "x"}),
)


async def check(it: Served, path: str, body: dict[str, Any]) -> None:
    response = await it.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), (path, body, response.text)
    if response.status_code == 400:
        found = response.json()
        message = found["message"] if "message" in found else found["error"]["message"]
        assert 10 < len(message) < 1500, (path, body, message)


@pytest.mark.parametrize(("path", "kind", "good"), BODIES)
def test_fields(path: str, kind: type[msgspec.Struct], good: dict[str, Any]) -> None:
    async def case(it: Served) -> None:
        for name in kind.__struct_fields__:
            for value in NONSENSE:
                await check(it, path, {**good, name: value})

    run_served(case)


def test_sampling_parameters() -> None:
    async def case(it: Served) -> None:
        for name in NAMES:
            for value in NONSENSE:
                await check(it, "/generate", {"text": "a", "sampling_params": {name: value}})

    run_served(case)


def test_messages() -> None:
    async def case(it: Served) -> None:
        for value in NONSENSE:
            for message in (value, {"role": value, "content": "a"}, {"role": "user", "content": value}):
                await check(it, "/v1/chat/completions", {"messages": [message]})
            message = {"role": "user", "content": [{"type": "text", "text": value}, value]}
            await check(it, "/v1/chat/completions", {"messages": [message]})
            for name in ("tool_calls", "name", "tool_call_id"):
                message = {"role": "assistant", "content": "a", name: value}
                await check(it, "/v1/chat/completions", {"messages": [message]})

    run_served(case)
