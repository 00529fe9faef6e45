"""/generate: shapes of requests and answers, streams, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fake_app import Served, events, run_served
from fake_engine import CONTEXT, VOCAB

from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Generate
from moonlang.core.sampling_parse import derive_seed


def test_one_prompt_gives_one_answer_with_the_documented_meta() -> None:
    async def case(it: Served) -> None:
        answer = (await it.http.post("/generate", json={"text": "abc", "rid": "r1"})).json()
        assert answer["text"] == "cba"
        assert answer["output_ids"] == [99, 98, 97]
        meta = answer["meta_info"]
        assert list(meta)[:5] == ["id", "finish_reason", "prompt_tokens", "weight_version", "num_retractions"]
        assert meta["id"] == "r1"
        assert meta["finish_reason"] == {"type": "stop", "matched": 1}
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 3, 2)
        assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
        assert meta["e2e_latency"] > 0

    run_served(case)


def test_lists_and_samples_come_back_flat_and_in_order() -> None:
    async def case(it: Served) -> None:
        body = {"text": ["ab", "cd"], "sampling_params": {"n": 2, "sampling_seed": 5}, "rid": "r"}
        answers = (await it.http.post("/generate", json=body)).json()
        assert [answer["text"] for answer in answers] == ["ba", "ba", "dc", "dc"]
        assert [answer["meta_info"]["id"] for answer in answers] == ["r_0_0", "r_0_1", "r_1_0", "r_1_1"]
        seeds = [message.sampling.seed for message in it.engine.wait_for(Generate)]
        assert seeds == [5, derive_seed(5, 1)] * 2

    run_served(case)


def test_per_prompt_lists() -> None:
    async def case(it: Served) -> None:
        body = {
            "input_ids": [[97, 98, 99], [100, 101]],
            "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 2}],
            "rid": ["x", "y"],
            "return_logprob": [True, False],
            "top_logprobs_num": [2, 0],
            "stream": False,
        }
        first, second = (await it.http.post("/generate", json=body)).json()
        assert (first["text"], second["text"]) == ("c", "ed")
        assert first["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
        assert first["meta_info"]["output_token_logprobs"] == [[-0.5, 99, None]]
        assert len(first["meta_info"]["output_top_logprobs"][0]) == 2
        assert "output_token_logprobs" not in second["meta_info"]

    run_served(case)


def test_logprobs_of_the_prompt_begin_with_null() -> None:
    async def case(it: Served) -> None:
        body = {
            "text": "abc",
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 1,
            "token_ids_logprob": [7, 8],
            "return_text_in_logprobs": True,
            "sampling_params": {"max_new_tokens": 1},
        }
        meta = (await it.http.post("/generate", json=body)).json()["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 97, "a"], [-0.5, 98, "b"], [-0.5, 99, "c"]]
        assert meta["input_top_logprobs"] == [None, [[0.0, 98, "b"]], [[0.0, 99, "c"]]]
        assert meta["output_token_ids_logprobs"] == [[[-2.0, 7, "\7"], [-2.0, 8, "\b"]]]
        assert meta["output_token_logprobs_length"] == 1

    run_served(case)


def test_a_stream_is_cumulative() -> None:
    async def case(it: Served) -> None:
        found = events(await it.http.post("/generate", json={"text": "abcd", "stream": True}))
        texts = [event["text"] for event in found]
        assert texts[-1] == "dcba"
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert [event["output_ids"] for event in found][-1] == [100, 99, 98, 97]
        assert [event["meta_info"]["finish_reason"] for event in found[:-1]] == [None] * (len(found) - 1)
        assert found[-1]["meta_info"]["finish_reason"]["type"] == "stop"
        assert "e2e_latency" not in found[0]["meta_info"] or len(found) == 1

    run_served(case)


def test_a_stream_holds_deltas_when_asked_to() -> None:
    async def case(it: Served) -> None:
        found = events(await it.http.post("/generate", json={"text": "abcd", "stream": True}))
        assert "".join(event["text"] for event in found) == "dcba"
        assert [token for event in found for token in event["output_ids"]] == [100, 99, 98, 97]

    run_served(case, ServerArgs(incremental_streaming_output=True))


def test_a_batched_stream_tells_its_sequences_apart() -> None:
    async def case(it: Served) -> None:
        found = events(await it.http.post("/generate", json={"text": ["ab", "cde"], "stream": True}))
        last = {event["index"]: event["text"] for event in found}
        assert last == {0: "ba", 1: "edc"}

    run_served(case)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "Exactly one of text and input_ids"),
        ({"text": "a", "input_ids": [1]}, "Exactly one of text and input_ids"),
        ({"text": []}, "text must hold at least one prompt"),
        ({"text": ""}, "The prompt is empty"),
        ({"text": 5}, "Expected `str | array | null`, got `int` - at `$.text`"),
        ({"text": ["a", 5]}, "Expected `str`, got `int` - at `$.text[1]`"),
        ({"input_ids": []}, "The prompt is empty"),
        ({"input_ids": ["a"]}, "input_ids must be a list of token ids"),
        ({"input_ids": [1.5]}, "input_ids must be a list of token ids"),
        ({"input_ids": [True]}, "input_ids must be a list of token ids"),
        ({"input_ids": [-1]}, "got -1."),
        ({"input_ids": [VOCAB]}, f"input_ids must hold token ids in [0, {VOCAB - 1}], got {VOCAB}."),
        ({"input_ids": [10**30]}, "got 1000000000000000000000000000000."),
        ({"input_ids": [[1], 2]}, "list of such lists"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature must be a finite number >= 0"),
        ({"text": "a", "sampling_params": {"what": 1}}, "Unknown sampling parameters: 'what'. Allowed: "),
        ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params must be one value or a list of 1"),
        ({"text": ["a"], "sampling_params": [{}, {}]}, "sampling_params must be one value or a list of 1"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid must be one value or a list of 2"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "must differ"),
        ({"text": "a", "rid": "x" * 300}, "rid must be at most 256 characters"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 9}, "logprob_start_len must be in [-1, 1]"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num must be in"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [1] * 1025}, "at most 1024 token ids, got 1025"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [9999]}, "token_ids_logprob must hold token ids"),
        ({"text": "a", "sampling_params": {"n": 0}}, "n must be an integer in [1, 1024]"),
        ({"text": ["a"] * 5, "sampling_params": {"n": 1000}}, "at most 4096 sequences"),
        ({"text": "a", "lora_path": "x"}, "lora_path is not supported"),
        ({"text": "a", "image_data": ["x"]}, "image_data is not supported"),
        ({"text": "a", "custom_logit_processor": "x"}, "--enable-custom-logit-processor"),
        ({"text": "a", "cache_salt": "x" * 2000}, "at most 1024 characters"),
        ({"text": "x" * CONTEXT}, f"The input ({CONTEXT} tokens) is longer than the model's context length ({CONTEXT}"),
        (
            {"text": "abcd", "sampling_params": {"max_new_tokens": CONTEXT}},
            f"maximum context length of {CONTEXT} tokens. You requested a total of {CONTEXT + 4} tokens: 4 tokens from",
        ),
    ],
)
def test_bad_calls_get_400_and_the_native_body(body: dict[str, Any], text: str) -> None:
    async def case(it: Served) -> None:
        response = await it.http.post("/generate", json=body)
        assert response.status_code == 400
        assert list(response.json()) == ["error"]
        assert text in response.json()["error"]["message"]
        assert not it.engine.received

    run_served(case)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"text": "a"} x',
        b"\xff\xfe",
        b'{"text": NaN}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xed\xa0\x80"}',
        b"[" * 100_000,
        b'{"sampling_params": ' + b'{"a":' * 50_000,
        b'{"input_ids": [' + b"9" * 5000 + b"]}",
        b'{"priority": 1e999}',
        b'["text"]',
        b'"text"',
        b"null",
    ],
)
def test_broken_json_gets_400(content: bytes) -> None:
    async def case(it: Served) -> None:
        response = await it.http.post("/generate", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert "message" in response.json()["error"]

    run_served(case)


def test_a_body_that_is_too_large_gets_413_before_it_is_read() -> None:
    async def case(it: Served) -> None:
        response = await it.http.post("/generate", content=b"x", headers={"content-length": str(1 << 30)})
        assert response.status_code == 413
        assert "16 MiB" in response.json()["error"]["message"]

        async def endless() -> Any:
            while True:
                yield b"x" * (1 << 20)

        response = await it.http.post("/generate", content=endless())
        assert response.status_code == 413

    run_served(case)


def test_null_and_unknown_fields_are_ignored() -> None:
    async def case(it: Served) -> None:
        names = ("rid", "sampling_params", "return_logprob", "image_data", "bootstrap_host", "priority", "lora_path")
        body = {"text": "ab", "bootstrap_room": 2**63 - 1, "surprise": {"a": [1]}, **dict.fromkeys(names)}
        assert (await it.http.post("/generate", json=body)).json()["text"] == "ba"

    run_served(case)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 500, 503, 504])
def test_a_refusal_of_the_engine_becomes_its_status(status: int, stream: bool) -> None:
    async def case(it: Served) -> None:
        body = {"text": "abc", "extra_key": f"refuse {status}", "stream": stream}
        response = await it.http.post("/generate", json=body)
        assert response.status_code == status
        if status == 400:
            assert response.json() == {"error": {"message": "It was not to be."}}
        else:
            assert response.json() == {
                "object": "error",
                "message": "It was not to be.",
                "type": str(status),
                "param": None,
                "code": status,
            }

    run_served(case)


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_after_the_first_token_comes_inside_the_stream(status: int) -> None:
    async def case(it: Served) -> None:
        body = {"text": "abcdef", "extra_key": f"break {status}", "stream": True}
        response = await it.http.post("/generate", json=body)
        if response.status_code == 200:  # unless everything came in one piece
            assert events(response)[-1]["error"] == {
                "message": "It was not to be.",
                "type": str(status),
                "code": status,
                "retryable": status == 503,
            }

    run_served(case)


def test_a_long_prompt_is_cut_when_the_server_allows_it() -> None:
    async def case(it: Served) -> None:
        body = {"text": "x" * 200, "sampling_params": {"max_new_tokens": 50}}
        assert (await it.http.post("/generate", json=body)).status_code == 200
        (message,) = it.engine.wait_for(Generate)
        assert len(message.input_ids) == CONTEXT - 1
        assert message.sampling.max_new_tokens == 1

    run_served(case, ServerArgs(allow_auto_truncate=True))


def test_priority_follows_the_servers_flags() -> None:
    async def case(it: Served) -> None:
        await it.http.post("/generate", json={"text": "a", "priority": 5})
        await it.http.post("/generate", json={"text": "a"})
        assert [message.priority for message in it.engine.wait_for(Generate, 2)] == [5, 3]

    run_served(case, ServerArgs(enable_priority_scheduling=True, default_priority_value=3))

    async def refused(it: Served) -> None:
        assert (await it.http.post("/generate", json={"text": "a", "priority": 5})).status_code == 400

    run_served(refused, ServerArgs(abort_on_priority_when_disabled=True))


def test_server_wide_parameters_stand_under_the_requests() -> None:
    async def case(it: Served) -> None:
        await it.http.post("/generate", json={"text": "a", "sampling_params": {"top_k": 2}})
        (message,) = it.engine.wait_for(Generate)
        assert (message.sampling.top_k, message.sampling.temperature, message.timeout_ms) == (2, 0.5, 1500)

    preferred = {"temperature": 0.5, "top_k": 9}
    run_served(case, ServerArgs(preferred_sampling_params=preferred, request_timeout_s=1.5))


def test_salts_and_keys_cannot_be_mistaken_for_one_another() -> None:
    async def case(it: Served) -> None:
        for salt, key in ((None, None), ("ab", "c"), ("a", "bc"), ("abc", None), (None, "abc")):
            await it.http.post("/generate", json={"text": "a", "cache_salt": salt, "extra_key": key})
        keys = [message.extra_key for message in it.engine.wait_for(Generate, 5)]
        assert keys[0] == ""
        assert len(set(keys)) == 5

    run_served(case)
