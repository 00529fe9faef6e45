"""POST /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base.errors import RequestError
from moonlang.core.messages import Generate, TextDelta
from moonlang.core.plan import TokenLogprob
from moonlang.entrypoints import exchange, generation, pairing, prompts
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.exchange import EventStream, json_response
from moonlang.entrypoints.openai import shapes
from moonlang.entrypoints.openai.chunks import Chunks
from moonlang.entrypoints.openai.protocol import REFUSED, CompletionRequest, native_sampling
from moonlang.entrypoints.openai.route import Envelope, refused, sampling_defaults
from moonlang.entrypoints.openai.shapes import LegacyLogprobs, Tally
from moonlang.entrypoints.prompts import Common, Prompt
from moonlang.entrypoints.stream import merge

DEFAULT_MAX_TOKENS = 16


class CompletionRoutes:
    """Text completions of one server."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._defaults = sampling_defaults(client)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        router.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        return router

    async def complete(self, request: Request) -> Response:
        """A continuation of each prompt, streamed or whole."""
        client = self._client
        try:
            body = await exchange.read_json(request, CompletionRequest)
            rid = prompts.checked_rid(body.rid or "") or client.fresh_rid()
            call = await self._call(body, rid)
            stream = exchange.watch(client.open(call.messages), request.receive)
            if body.stream:
                return EventStream(stream, await exchange.begin(stream), _chunks(client, body, call))
            found: list[list[TextDelta]] = [[] for _ in call.messages]
            await exchange.collect(stream, lambda index, delta: found[index].append(delta))
        except RequestError as error:
            return refused(error)
        return json_response(_answer(client, body, call, [merge(deltas) for deltas in found]))

    async def _call(self, body: CompletionRequest, rid: str) -> _Call:
        generation.refuse_unsupported(body, REFUSED, self._client)
        if body.suffix:
            raise RequestError("suffix is not supported: this server does not fill in the middle.")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise RequestError("best_of must equal n: this server answers with all samples that it draws.")
        asked: list[Prompt] = []
        texts = _prompts(body.prompt)
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = native_sampling(body, limit)
        for index, text in enumerate(texts):
            ids = await prompts.token_ids(self._client, text)
            logprob = None
            if body.logprobs is not None:
                start = 0 if body.echo else -1
                logprob = prompts.logprob_spec(self._client, len(ids), start=start, top=body.logprobs, ids=())
            name = rid if len(texts) == 1 else f"{rid}_{index}"
            asked.append(Prompt(ids=ids, sampling=sampling, defaults=self._defaults, logprob=logprob, rid=name))
        key = prompts.cache_key(body.cache_salt, body.extra_key)
        rooms = pairing.rooms(self._client.args, body)
        common = Common(
            stream=bool(body.stream),
            priority=body.priority,
            extra_key=key,
            rooms=rooms,
            dp_rank=pairing.dp_rank(self._client.args, body),
        )
        messages = prompts.expand(self._client, asked, common)
        samples = len(messages) // len(asked)
        echoes = [self._echo(text) if body.echo else "" for text in texts for _ in range(samples)]
        return _Call(rid, messages, samples, echoes)

    def _echo(self, prompt: str | list[Any]) -> str:
        return prompt if isinstance(prompt, str) else self._client.need_tokenizer().decode(prompt, False)


@dataclass(frozen=True, slots=True)
class _Call:
    """A checked request. samples: choices per prompt; echoes: what each choice's text begins with."""

    rid: str
    messages: list[Generate]
    samples: int
    echoes: list[str]


def _prompts(value: str | list[Any]) -> list[str | list[Any]]:
    """The prompts in any of the four forms that OpenAI allows."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise RequestError("prompt must not be empty.")
    if all(isinstance(item, int) for item in value):
        return [value]
    if not (all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value)):
        raise RequestError("prompt must be a string, a list of strings, token ids or a list of lists of token ids.")
    if len(value) > prompts.MAX_SEQUENCES_PER_CALL:
        raise RequestError(f"prompt must hold at most {prompts.MAX_SEQUENCES_PER_CALL} prompts, got {len(value)}.")
    return value


def _entries(delta: TextDelta) -> tuple[TokenLogprob, ...]:
    return delta.prompt + delta.output


def _answer(client: EngineClient, body: CompletionRequest, call: _Call, wholes: list[TextDelta]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    tallies: list[Tally] = []
    for index, whole in enumerate(wholes):
        tally = Tally()
        tally.add(whole)
        tallies.append(tally)
        logprobs = None
        if body.logprobs is not None:
            logprobs = LegacyLogprobs(client.token_text, body.logprobs > 0).take(_entries(whole))
        choices.append(
            {
                "index": index,
                "text": call.echoes[index] + whole.text,
                "logprobs": logprobs,
                "finish_reason": whole.finish.kind if whole.finish else None,
                "matched_stop": shapes.matched_stop(whole.finish),
            }
        )
    usage = shapes.usage(tallies, call.samples, client.args.enable_cache_report)
    return Envelope(client, body, call.rid, "text_completion").answer(choices, usage)


def _chunks(client: EngineClient, body: CompletionRequest, call: _Call) -> Chunks:
    envelope = Envelope(client, body, call.rid, "text_completion")
    choices = _Choices(client, body, call)
    return Chunks(client, body, envelope, choices, count=len(call.messages), samples=call.samples)


class _Choices:
    """The choices of a completion stream: the echo of the prompt, text, at last the reason for the end."""

    def __init__(self, client: EngineClient, body: CompletionRequest, call: _Call) -> None:
        self._echoes = list(call.echoes)
        self._logprobs: list[LegacyLogprobs] = []
        if body.logprobs is not None:
            self._logprobs = [LegacyLogprobs(client.token_text, body.logprobs > 0) for _ in call.messages]

    def plain(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, text)

    def render(self, chunks: Chunks, index: int, delta: TextDelta) -> bytes:
        text = delta.text
        if self._echoes[index]:
            text, self._echoes[index] = self._echoes[index] + text, ""
        if delta.finish is None and not self._logprobs and not chunks.usage_always:
            return chunks.text(index, text)  # also without text yet: clients tell the time of a token by its chunk
        logprobs = self._logprobs[index].take(_entries(delta)) if self._logprobs else None
        finish = delta.finish.kind if delta.finish is not None else None
        return chunks.chunk(self._choice(index, text, logprobs, finish, shapes.matched_stop(delta.finish)))

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        matched_stop: int | str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
            "matched_stop": matched_stop,
        }
