"""Chat and text completions: what reaches the engine, and the shapes of what comes back."""

from __future__ import annotations

from typing import Any

import pytest
from fake_app import Served, events, run_served

from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Generate
from moonlang.core.sampling import GrammarSpec, SamplingParams

HELLO = [{"role": "user", "content": "hi"}]  # renders to "u:hi;a:", which the engine says backwards
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


async def sent(it: Served) -> Generate:
    return it.engine.wait_for(Generate)[-1]


def test_chat_answer() -> None:
    async def case(it: Served) -> None:
        answer = (await it.http.post(CHAT, json={"model": "m", "messages": HELLO})).json()
        assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "metadata"}
        assert (answer["object"], answer["model"]) == ("chat.completion", "m")
        assert len(answer["id"]) == 32
        assert int(answer["id"], 16) >= 0
        (choice,) = answer["choices"]
        assert choice["message"] == {
            "role": "assistant",
            "content": ":a;ih:u",
            "reasoning_content": None,
            "tool_calls": None,
        }
        assert (choice["finish_reason"], choice["matched_stop"], choice["logprobs"]) == ("stop", 1, None)
        assert answer["usage"] == {
            "prompt_tokens": 7,
            "total_tokens": 14,
            "completion_tokens": 7,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        }
        assert (await sent(it)).sampling.max_new_tokens is None  # the rest of the context

    run_served(case)


def test_cache_report_and_names() -> None:
    async def case(it: Served) -> None:
        answer = (await it.http.post(CHAT, json={"messages": HELLO, "n": 2})).json()
        assert answer["model"] == "served"
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        assert answer["usage"]["prompt_tokens"] == 7  # counted once, however many samples
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]

    run_served(case, ServerArgs(enable_cache_report=True, served_model_name="served"))


def test_chat_stream() -> None:
    async def case(it: Served) -> None:
        body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
        first, *middle, last, usage = events(await it.http.post(CHAT, json=body))
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert first["choices"][0]["delta"]["content"] == ""
        assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == ":a;ih:u"
        assert all(event["choices"][0]["finish_reason"] is None for event in middle)
        assert all(event["object"] == "chat.completion.chunk" and event["usage"] is None for event in middle)
        assert (last["choices"][0]["finish_reason"], last["choices"][0]["matched_stop"]) == ("stop", 1)
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 7
        assert len({event["id"] for event in (first, *middle, last, usage)}) == 1

    run_served(case)


def test_usage_in_every_chunk_and_by_default() -> None:
    async def case(it: Served) -> None:
        body = {"messages": HELLO, "stream": True, "stream_options": {"continuous_usage_stats": True}, "n": 2}
        found = events(await it.http.post(CHAT, json=body))
        assert all(event["usage"]["prompt_tokens"] == 7 for event in found[2:])
        assert found[-1]["usage"]["completion_tokens"] == 14
        texts = {0: "", 1: ""}
        for event in found[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["delta"]["content"] or ""
        assert set(texts.values()) == {":a;ih:u"}

    run_served(case, ServerArgs(stream_response_default_include_usage=True))


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(stream: bool) -> None:
    async def case(it: Served) -> None:
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 2, "stream": stream}
        response = await it.http.post(CHAT, json=body)
        found = events(response) if stream else [response.json()]
        content = [
            entry
            for event in found
            for choice in event["choices"]
            if choice["logprobs"]
            for entry in choice["logprobs"]["content"]
        ]
        assert [entry["token"] for entry in content] == [":", "a"]
        assert content[1] == {
            "token": "a",
            "bytes": [97],
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "a", "bytes": [97], "logprob": 0.0},
                {"token": "b", "bytes": [98], "logprob": -0.5},
            ],
        }

    run_served(case)


def test_text_completion_in_all_four_forms() -> None:
    async def case(it: Served) -> None:
        for prompt, texts in (
            ("ab", ["ba"]),
            (["ab", "cd"], ["ba", "dc"]),
            ([97, 98], ["ba"]),
            ([[97, 98], [99]], ["ba", "c"]),
        ):
            answer = (await it.http.post(TEXT, json={"prompt": prompt})).json()
            assert answer["object"] == "text_completion"
            assert [choice["text"] for choice in answer["choices"]] == texts
            assert answer["usage"]["completion_tokens"] == sum(map(len, texts))
        assert (await sent(it)).sampling.max_new_tokens == 16

    run_served(case)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_the_prompt(stream: bool) -> None:
    async def case(it: Served) -> None:
        body = {"prompt": [97, 98], "echo": True, "logprobs": 1, "stream": stream}
        response = await it.http.post(TEXT, json=body)
        found = [event["choices"][0] for event in (events(response) if stream else [response.json()])]
        assert "".join(choice["text"] for choice in found) == "abba"
        merged: dict[str, list[Any]] = {}
        for choice in found:
            for name, values in choice["logprobs"].items():
                merged.setdefault(name, []).extend(values)
        assert merged["tokens"] == ["a", "b", "b", "a"]
        assert merged["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert merged["text_offset"] == [0, 1, 2, 3]
        assert merged["top_logprobs"] == [None, {"b": 0.0}, {"b": 0.0}, {"a": 0.0}]

    run_served(case)


def test_completion_stream_ends_with_a_reason() -> None:
    async def case(it: Served) -> None:
        found = events(await it.http.post(TEXT, json={"prompt": "abcd", "max_tokens": 2, "stream": True}))
        assert "".join(event["choices"][0]["text"] for event in found) == "dc"
        assert [event["choices"][0]["finish_reason"] for event in found][-1] == "length"

    run_served(case)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_new_tokens": 4}),
        ({"seed": 11, "min_tokens": 2}, {"seed": 11, "min_new_tokens": 2}),
        ({"stop": ["x"], "stop_token_ids": [5]}, {"stop": ("x",), "stop_token_ids": (5,)}),
        ({"logit_bias": {"5": 1}}, {"logit_bias": {5: 1.0}}),
        ({"temperature": 0, "top_k": 3, "min_p": 0.1}, {"temperature": 0.0, "top_k": 3, "min_p": 0.1}),
        ({"ignore_eos": True, "no_stop_trim": True}, {"ignore_eos": True, "no_stop_trim": True}),
        ({"regex": "a+"}, {"grammar": GrammarSpec("regex", "a+")}),
        ({"response_format": {"type": "text"}}, {"grammar": None}),
        ({"response_format": {"type": "json_object"}}, {"grammar": GrammarSpec("json_schema", '{"type":"object"}')}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            {"grammar": GrammarSpec("json_schema", '{"type":"array"}')},
        ),
        ({"response_format": {"type": "regex", "regex": "a"}}, {"grammar": GrammarSpec("regex", "a")}),
        ({"response_format": {"type": "ebnf", "ebnf": "b"}}, {"grammar": GrammarSpec("ebnf", "b")}),
    ],
)
def test_openai_fields_become_sampling_parameters(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    async def case(it: Served) -> None:
        assert (await it.http.post(CHAT, json={"messages": HELLO, **fields})).status_code == 200
        params = (await sent(it)).sampling
        assert {name: getattr(params, name) for name in expected} == expected

    run_served(case)


def test_the_models_own_defaults_apply_to_this_dialect_only() -> None:
    generation = {"temperature": 0.25, "top_p": 0.5, "do_sample": True}

    async def model(it: Served) -> None:
        await it.http.post(CHAT, json={"messages": HELLO, "top_p": 0.75})
        params = (await sent(it)).sampling
        assert (params.temperature, params.top_p) == (0.25, 0.75)
        await it.http.post("/generate", json={"text": "a"})
        assert it.engine.wait_for(Generate, 2)[1].sampling.temperature == SamplingParams().temperature

    async def openai(it: Served) -> None:
        await it.http.post(TEXT, json={"prompt": "a"})
        assert (await sent(it)).sampling.temperature == 1.0

    run_served(model, generation=generation)
    run_served(openai, ServerArgs(sampling_defaults="openai"), generation=generation)


def test_contents_in_parts_and_answers_begun() -> None:
    async def case(it: Served) -> None:
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "So"},
        ]
        body = {"messages": messages, "continue_final_message": True}
        answer = (await it.http.post(CHAT, json=body)).json()
        assert answer["choices"][0]["message"]["content"] == "u:a b;a:So"[::-1]
        body = {"messages": HELLO, "input_ids": [120, 121]}
        answer = (await it.http.post(CHAT, json=body)).json()
        assert answer["choices"][0]["message"]["content"] == "yx"

    run_served(case)


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (CHAT, {}, "missing required field `messages`"),
        (CHAT, {"messages": []}, "at least one message"),
        (CHAT, {"messages": "hi"}, "Expected `array`, got `str` - at `$.messages`"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role must be a string"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content must be"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be"),
        (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "parts with a type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is served"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text part without text"),
        (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [5]}]}, "messages[0].tool_calls must"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 9999}}]}]},
            "nested too deeply",
        ),
        (CHAT, {"messages": HELLO, "temperature": -1}, "temperature must be a finite number >= 0, got -1."),
        (CHAT, {"messages": HELLO, "max_tokens": "5"}, "Expected `int | null`, got `str` - at `$.max_tokens`"),
        (CHAT, {"messages": HELLO, "max_tokens": 5000}, "Requested token count exceeds"),
        (CHAT, {"messages": HELLO, "top_logprobs": 21}, "top_logprobs must be in [0, 20]"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "yaml"}}, "response_format.type must be one of"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice must be auto or none"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": 1}}, "must not hold 'messages'"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"self": 1}}, "must not hold 'self'"),
        (CHAT, {"messages": HELLO, "regex": "a", "ebnf": "b"}, "Only one of"),
        (TEXT, {"prompt": []}, "prompt must not be empty"),
        (TEXT, {"prompt": ["a", 1]}, "prompt must be a string, a list of strings"),
        (TEXT, {"prompt": {"a": 1}}, "Expected `str | array`"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        (TEXT, {"prompt": "a", "best_of": 3}, "best_of must equal n"),
        (TEXT, {"prompt": "a", "logprobs": -1}, "must be in"),
        (TEXT, {"prompt": "a", "n": 2000}, "n must be"),
        (TEXT, {"prompt": "x" * 100}, "is longer than the model's context length"),
    ],
)
def test_bad_requests_get_400_and_the_openai_body(path: str, body: dict[str, Any], text: str) -> None:
    async def case(it: Served) -> None:
        response = await it.http.post(path, json=body)
        assert response.status_code == 400
        error = response.json()
        assert text in error.pop("message")
        assert error == {"object": "error", "type": "BadRequestError", "param": None, "code": 400}
        assert not it.engine.received

    run_served(case)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_503(stream: bool) -> None:
    async def case(it: Served) -> None:
        body = {"messages": HELLO, "extra_key": "refuse 503", "stream": stream}
        response = await it.http.post(CHAT, json=body)
        assert response.status_code == 503
        assert response.json()["type"] == "503"

    run_served(case)
