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
from moonlang.entrypoints.receipt import Receipt
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
            receipts = [Receipt() for _ in messages] if body.return_meta_info else []
            stream = exchange.watch(client.open(messages), request.receive)
            if body.stream:
                chunks = _chunks(client, body, rid, len(messages), receipts)
                return EventStream(stream, await exchange.begin(stream), chunks)
            found: list[list[TextDelta]] = [[] for _ in messages]
            await exchange.collect(stream, lambda index, delta: found[index].append(delta))
        except RequestError as error:
            return refused(error)
        wholes = [merge(deltas) for deltas in found]
        for receipt, whole in zip(receipts, wholes, strict=False):
            receipt.add(whole)
        return json_response(_answer(client, body, rid, wholes, receipts))

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
        common = Common(
            stream=bool(body.stream),
            priority=body.priority,
            extra_key=key,
            rooms=rooms,
            dp_rank=pairing.dp_rank(self._client.args, body),
        )
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


def _answer(
    client: EngineClient, body: ChatRequest, rid: str, wholes: list[TextDelta], receipts: list[Receipt]
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    tallies: list[Tally] = []
    for index, whole in enumerate(wholes):
        tally = Tally()
        tally.add(whole)
        tallies.append(tally)
        message = {"role": "assistant", "content": whole.text, "reasoning_content": None, "tool_calls": None}
        choice = {
            "index": index,
            "message": message,
            "logprobs": shapes.chat_logprobs(whole.output, client.token_text) if body.logprobs else None,
            "finish_reason": whole.finish.kind if whole.finish else None,
            "matched_stop": shapes.matched_stop(whole.finish),
        }
        if receipts:
            choice["meta_info"] = receipts[index].meta_info(client, whole)
        choices.append(choice)
    usage = shapes.usage(tallies, len(wholes), client.args.enable_cache_report)
    return Envelope(client, body, rid, "chat.completion").answer(choices, usage)


def _chunks(client: EngineClient, body: ChatRequest, rid: str, count: int, receipts: list[Receipt]) -> Chunks:
    envelope = Envelope(client, body, rid, "chat.completion.chunk")
    return Chunks(client, body, envelope, _Choices(client, body, count, receipts), count=count, samples=count)


class _Choices:
    """The choices of a chat stream: first the role, then content, at last the reason for the end."""

    def __init__(self, client: EngineClient, body: ChatRequest, count: int, receipts: list[Receipt]) -> None:
        """receipts: one per choice, or none when they are not wanted."""
        self._client = client
        self._receipts = receipts
        self._logprobs = bool(body.logprobs)
        self._begun = [False] * count

    def plain(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, {"content": text})

    def render(self, chunks: Chunks, index: int, delta: TextDelta) -> bytes:
        parts: list[bytes] = []
        if self._receipts:
            self._receipts[index].add(delta)
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
            if self._receipts:
                last["meta_info"] = self._receipts[index].meta_info(self._client, delta)
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
