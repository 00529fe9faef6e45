"""The prompt's log probabilities, taken from the prefill server's answer into the decode server's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from moonlang.base.errors import PeerError
from moonlang.router import merge

PROMPT = [[None, 1, None], [-0.5, 2, None]]


def native(**meta: Any) -> dict[str, Any]:
    return {"text": "x", "meta_info": {"output_token_logprobs": [[-1.0, 3, None]], **meta}}


def completed(path: str, prefill: Any, decode: Any) -> Any:
    fill = merge.filler(path, json.dumps(prefill).encode())
    return json.loads(merge.whole(fill, json.dumps(decode).encode()))


def streamed(path: str, prefill: Any, pieces: list[bytes]) -> bytes:
    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def main() -> bytes:
        return b"".join(
            [piece async for piece in merge.events(merge.filler(path, json.dumps(prefill).encode()), source())]
        )

    return asyncio.run(main())


def test_native_answers() -> None:
    front = native(input_token_logprobs=PROMPT, input_top_logprobs=[None, [[-0.5, 2, None]]])
    found = completed("/generate", front, native(input_token_logprobs=[]))
    assert found == native(input_token_logprobs=PROMPT, input_top_logprobs=[None, [[-0.5, 2, None]]])
    batch = completed("/generate", [front, native(input_token_logprobs=PROMPT[:1])], [native(), native()])
    assert [one["meta_info"]["input_token_logprobs"] for one in batch] == [PROMPT, PROMPT[:1]]


def test_what_the_decode_server_computed_itself_stays() -> None:
    other = [[None, 1, None], [-0.25, 2, None]]
    found = completed("/generate", native(input_token_logprobs=PROMPT), native(input_token_logprobs=other))
    assert found["meta_info"]["input_token_logprobs"] == other


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_native_streams_however_they_are_cut(size: int) -> None:
    front = [native(input_token_logprobs=PROMPT), native(input_token_logprobs=PROMPT[:1])]
    error = {"error": {"message": "no"}}
    whole = event({**native(), "index": 1}) + event({**native(), "index": 0}) + event(error) + b"data: [DONE]\n\n"
    found = streamed("/generate", front, [whole[at : at + size] for at in range(0, len(whole), size)])
    *events, end, rest = found.split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    first, second, third = (json.loads(one.removeprefix(b"data: ")) for one in events)
    assert first["meta_info"]["input_token_logprobs"] == PROMPT[:1]
    assert second["meta_info"]["input_token_logprobs"] == PROMPT
    assert third == error


def lists(offsets: list[int], tokens: list[str], values: list[float | None], top: bool = True) -> dict[str, Any]:
    choices = [{token: value} if value is not None else None for token, value in zip(tokens, values, strict=True)]
    return {
        "text_offset": offsets,
        "token_logprobs": values,
        "tokens": tokens,
        "top_logprobs": choices if top else None,
    }


FRONT = {"choices": [{"index": 0, "text": "abcd", "logprobs": lists([0, 1, 3], ["a", "bc", "d"], [None, -0.5, -1.0])}]}


def test_echoed_completions_are_one_list() -> None:
    back = {"choices": [{"index": 0, "text": "abcde", "logprobs": lists([0, 1], ["d", "e"], [-1.0, -2.0])}]}
    found = completed("/v1/completions", FRONT, back)
    assert found["choices"][0]["logprobs"] == lists([0, 1, 3, 4], ["a", "bc", "d", "e"], [None, -0.5, -1.0, -2.0])
    plain = {"choices": [{"index": 0, "logprobs": lists([0], ["d"], [-1.0], top=False)}]}
    assert completed("/v1/completions", FRONT, plain)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_echoed_completion_streams_have_the_prompt_in_their_first_chunk() -> None:
    chunks = [
        {"choices": [{"index": 0, "text": "abcd", "logprobs": lists([0], ["d"], [-1.0])}]},
        {"choices": [{"index": 0, "text": "e", "logprobs": lists([1], ["e"], [-2.0])}]},
        {"choices": [], "usage": {}},
    ]
    found = streamed("/v1/completions", FRONT, [b"".join(map(event, chunks)) + b"data: [DONE]\n\n"])
    first, second, last, done, _ = found.split(b"\n\n")
    assert json.loads(first[6:])["choices"][0]["logprobs"]["text_offset"] == [0, 1, 3]
    assert json.loads(second[6:])["choices"][0]["logprobs"] == lists([4], ["e"], [-2.0])
    assert json.loads(last[6:]) == chunks[2]
    assert done == b"data: [DONE]"


@pytest.mark.parametrize("prefill", [b"", b"{}", b"[1]", b"[]]", b'{"choices":[{"index":0,"logprobs":null}]}'])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_an_answer_without_them_is_a_failure(path: str, prefill: bytes) -> None:
    with pytest.raises(PeerError):
        merge.filler(path, prefill)
