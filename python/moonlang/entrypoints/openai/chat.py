"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base.errors import RequestError
from moonlang.core.messages import Generate, TextDelta
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling_parse import shown
from moonlang.entrypoints import exchange, generation, pairing, prompts
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.exchange import EventStream, json_response
from moonlang.entrypoints.openai import conversation, shapes
from moonlang.entrypoints.openai.chunks import Chunks
from moonlang.entrypoints.openai.protocol import REFUSED, ChatRequest, native_sampling
from moonlang.entrypoints.openai.route import Envelope, refused, sampling_defaults
from moonlang.entrypoints.openai.shapes import Tally
from moonlang.entrypoints.prompts import Common, Prompt
from moonlang.entrypoints.stream import merge
from moonlang.text.chat_template import ChatTemplate

MAX_TOP_LOGPROBS = 20  # as OpenAI has it


class ChatRoutes:
    """Chat completions of one server."""

    def __init__(self, client: EngineClient, template: ChatTemplate) -> None:
        self._client = client
        self._template = template
        self._defaults = sampling_defaults(client)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        router.add_api_route("/v1/chat/completions", self.complete, methods=["POST"], response_model=None)
        return router

    async def complete(self, request: Request) -> Response:
        """An answer to a conversation, streamed or whole."""
        client = self._client
        try:
            body = await exchange.read_json(request, ChatRequest)
            rid = prompts.checked_rid(body.rid or "") or client.fresh_rid()
            messages = await self._messages(body, rid)
            stream = exchange.watch(client.open(messages), request.receive)
            if body.stream:
                return EventStream(stream, await exchange.begin(stream), _chunks(client, body, rid, len(messages)))
            found: list[list[TextDelta]] = [[] for _ in messages]
            await exchange.collect(stream, lambda index, delta: found[index].append(delta))
        except RequestError as error:
            return refused(error)
        return json_response(_answer(client, body, rid, [merge(deltas) for deltas in found]))

    async def _messages(self, body: ChatRequest, rid: str) -> list[Generate]:
        generation.refuse_unsupported(body, REFUSED, self._client)
        if body.tool_choice not in (None, "auto", "none"):
            raise RequestError("tool_choice must be auto or none: this server cannot force a tool call.")
        ids = await prompts.token_ids(self._client, body.input_ids) if body.input_ids else await self._render(body)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        asked = Prompt(
            ids=ids,
            sampling=native_sampling(body, limit),
            defaults=self._defaults,
            logprob=self._logprob(body, len(ids)),
            rid=rid,
        )
        key = prompts.cache_key(body.cache_salt, body.extra_key)
        rooms = pairing.rooms(self._client.args, body)
        common = Common(stream=bool(body.stream), priority=body.priority, extra_key=key, rooms=rooms)
        return prompts.expand(self._client, [asked], common)

    async def _render(self, body: ChatRequest) -> list[int]:
        text = conversation.render(
            self._template,
            body.messages,
            tools=None if body.tool_choice == "none" else body.tools,
            continue_final=bool(body.continue_final_message),
            variables={**(self._client.args.default_chat_template_kwargs or {}), **(body.chat_template_kwargs or {})},
        )
        ids = await self._client.encode(text, add_special_tokens=False)
        if not ids:
            raise RequestError("The chat template rendered these messages to an empty prompt.")
        return ids

    def _logprob(self, body: ChatRequest, prompt_len: int) -> LogprobSpec | None:
        top = body.top_logprobs or 0
        if not 0 <= top <= MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {shown(top)}.")
        if not body.logprobs:
            return None
        return prompts.logprob_spec(self._client, prompt_len, start=-1, top=top, ids=())


def _answer(client: EngineClient, body: ChatRequest, rid: str, wholes: list[TextDelta]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    tallies: list[Tally] = []
    for index, whole in enumerate(wholes):
        tally = Tally()
        tally.add(whole)
        tallies.append(tally)
        choices.append(
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": whole.text,
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": shapes.chat_logprobs(whole.output, client.token_text) if body.logprobs else None,
                "finish_reason": whole.finish.kind if whole.finish else None,
                "matched_stop": shapes.matched_stop(whole.finish),
            }
        )
    usage = shapes.usage(tallies, len(wholes), client.args.enable_cache_report)
    return Envelope(client, body, rid, "chat.completion").answer(choices, usage)


def _chunks(client: EngineClient, body: ChatRequest, rid: str, count: int) -> Chunks:
    envelope = Envelope(client, body, rid, "chat.completion.chunk")
    return Chunks(client, body, envelope, _Choices(client, body, count), count=count, samples=count)


class _Choices:
    """The choices of a chat stream: first the role, then content, at last the reason for the end."""

    def __init__(self, client: EngineClient, body: ChatRequest, count: int) -> None:
        self._client = client
        self._logprobs = bool(body.logprobs)
        self._begun = [False] * count

    def plain(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, {"content": text})

    def render(self, chunks: Chunks, index: int, delta: TextDelta) -> bytes:
        parts: list[bytes] = []
        if not self._begun[index]:
            self._begun[index] = True
            parts.append(chunks.chunk(self._choice(index, {"role": "assistant", "content": ""})))
        if self._logprobs or chunks.usage_always:
            if delta.text or delta.output:
                logprobs = shapes.chat_logprobs(delta.output, self._client.token_text) if self._logprobs else None
                parts.append(chunks.chunk(self._choice(index, {"content": delta.text}, logprobs=logprobs)))
        elif delta.text:
            parts.append(chunks.text(index, delta.text))
        if delta.finish is not None:
            stop = shapes.matched_stop(delta.finish)
            last = self._choice(index, {"content": None}, finish=delta.finish.kind, matched_stop=stop)
            parts.append(chunks.chunk(last))
        return b"".join(parts)

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        matched_stop: int | str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"role": None, **delta, "reasoning_content": None, "tool_calls": None},
            "logprobs": logprobs,
            "finish_reason": finish,
            "matched_stop": matched_stop,
        }
