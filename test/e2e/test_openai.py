"""The openai client against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from live_server import LiveServer
from openai.types.chat import ChatCompletionUserMessageParam

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "copy: red blue green"}]
MODEL = "any"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(answer.id) == 32


def test_a_chat_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=12)
    text, reason, usage = "", None, None
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert reason == whole.choices[0].finish_reason
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_cache_is_reported(client: openai.OpenAI) -> None:
    message: ChatCompletionUserMessageParam = {"role": "user", "content": "The same long question, again. " * 20}
    for _ in range(2):
        answer = client.chat.completions.create(model=MODEL, messages=[message], temperature=0, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens


def test_a_token_without_text_has_a_chunk_in_a_completion_stream(client: openai.OpenAI) -> None:
    end_id = 2
    with client.completions.create(
        model=MODEL,
        prompt="Once",
        temperature=0,
        max_tokens=64,
        logit_bias={str(end_id): 100},
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    assert {choice.text for choice in choices} == {""}
    assert [choice.finish_reason for choice in choices][:1] == [None]
    assert choices[-1].finish_reason == "length"


def test_samples_and_seeds(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, n=3, seed=5, temperature=1.5, max_tokens=16, extra_body={"ignore_eos": True}
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert bytes(entry.bytes or []).decode() == entry.token


def test_completions_in_batches_with_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["Once upon", "There was"], temperature=0, max_tokens=4, echo=True, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("Once upon")
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs
    assert logprobs.token_logprobs[0] is None


def test_completion_stream(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 10}
    whole = client.completions.create(**arguments)
    with client.completions.create(**arguments, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_json_schema_is_kept_to(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=1,
        seed=1,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}},
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found["colour"] in ("red", "blue")
    assert found["count"] in range(10)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"


def test_mistakes_are_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="at least one message"):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
        client.completions.create(model=MODEL, prompt="word " * 20_000)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")


def test_closing_a_stream_frees_its_pages(server: LiveServer, client: openai.OpenAI) -> None:
    server.wait_idle()
    aborted = server.load()["total_aborted"]
    with client.completions.create(
        model=MODEL, prompt="Once", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    assert server.wait_idle()["total_aborted"] == aborted + 1
