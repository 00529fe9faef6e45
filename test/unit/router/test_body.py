"""What the router reads of a body, and what it adds to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moonlang.base.errors import RequestError
from moonlang.router import body


def read(**fields: Any) -> body.Body:
    return body.read(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"text": "a"}, None),
        ({"text": ["a", "b"]}, 2),
        ({"text": ["a"]}, 1),
        ({"input_ids": [1, 2, 3]}, None),
        ({"input_ids": [[1, 2], [3]]}, 2),
        ({"text": None, "input_ids": [[1], [2], [3]]}, 3),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": [5, 6]}, None),
        ({"messages": [{"role": "user", "content": "a"}]}, None),
        ({}, None),
        ({"text": []}, None),
    ],
)
def test_batches_are_counted(fields: dict[str, Any], count: int | None) -> None:
    assert read(**fields).count == count


def test_prompts_that_begin_alike_begin_alike() -> None:
    first = read(tools=[1], messages=[{"role": "user", "content": "a"}])
    longer = read(messages=[{"role": "user", "content": "a"}, {"role": "assistant"}], tools=[1], stream=True)
    assert longer.prompt.startswith(first.prompt[:-1])
    assert longer.stream
    assert not first.stream


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"return_logprob": True}, False),
        ({"return_logprob": True, "logprob_start_len": 0}, True),
        ({"return_logprob": False, "logprob_start_len": 0}, False),
        ({"return_logprob": [True, False], "logprob_start_len": [-1, 3]}, True),
        ({"echo": True, "logprobs": 0}, True),
        ({"echo": True}, False),
        ({"logprobs": True}, False),
    ],
)
def test_who_wants_log_probabilities_of_the_prompt(fields: dict[str, Any], wanted: bool) -> None:
    assert read(text="a", **fields).prompt_logprobs is wanted


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"a":1,}', b'"text"', b'{"text": ["a", }', b"{} {}", b"\xff{}", b"1"]
)
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError, match="not valid"):
        body.read(raw)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(RequestError):
        body.read(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize("raw", [b"{}", b" { } \n", b'{"a": 1.50, "b": "}"}', b'{"a":{}}', b'{"x":"\\u00e9{"} '])
def test_fields_are_added_and_the_rest_stays_as_it_is(raw: bytes) -> None:
    found = body.with_fields(raw, {"bootstrap_room": 5})
    assert json.loads(found) == {**json.loads(raw), "bootstrap_room": 5}
    assert found.startswith(raw.rstrip()[:-1].rstrip())


def test_a_client_cannot_set_the_place() -> None:
    raw = b'{"bootstrap_host":"evil","text":"a"}'
    assert json.loads(body.with_fields(raw, body.place("good", None, [1], False)))["bootstrap_host"] == "good"


def test_a_batch_meets_in_as_many_rooms() -> None:
    assert body.place("h", 1, [5, 6], True) == {
        "bootstrap_host": ["h", "h"],
        "bootstrap_port": [1, 1],
        "bootstrap_room": [5, 6],
    }
