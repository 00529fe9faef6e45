"""POST /v1/tokenize and /v1/detokenize, and the same without /v1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base.errors import RequestError
from moonlang.entrypoints import exchange, prompts
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.exchange import json_response
from moonlang.entrypoints.openai import conversation
from moonlang.entrypoints.openai.protocol import DetokenizeRequest, TokenizeRequest
from moonlang.entrypoints.openai.route import refused
from moonlang.text.chat_template import ChatTemplate


class TokenRoutes:
    """The tokenizer as a service."""

    def __init__(self, client: EngineClient, template: ChatTemplate) -> None:
        self._client = client
        self._template = template

    def router(self) -> APIRouter:
        router = APIRouter(tags=["openai"])
        for prefix in ("/v1", ""):
            router.add_api_route(f"{prefix}/tokenize", self.tokenize, methods=["POST"], response_model=None)
            router.add_api_route(f"{prefix}/detokenize", self.detokenize, methods=["POST"], response_model=None)
        return router

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt, of several, or of a rendered conversation."""
        try:
            body = await exchange.read_json(request, TokenizeRequest)
            found = await self._tokens(body)
        except RequestError as error:
            return refused(error)
        batched = isinstance(body.prompt, list)
        counts = [len(ids) for ids in found]
        answer: dict[str, Any] = {
            "tokens": found if batched else found[0],
            "count": counts if batched else counts[0],
            "max_model_len": self._client.model.context_length,
        }
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, or of several lists of them."""
        try:
            body = await exchange.read_json(request, DetokenizeRequest)
            decode = self._client.need_tokenizer().decode
            batched = bool(body.tokens) and isinstance(body.tokens[0], list)
            vocab = self._client.model.vocab_size
            lists = [prompts.checked_ids(ids, vocab, "tokens") for ids in (body.tokens if batched else [body.tokens])]
            texts = [decode(ids, body.skip_special_tokens) for ids in lists]
        except RequestError as error:
            return refused(error)
        return json_response({"text": texts if batched else texts[0]})

    async def _tokens(self, body: TokenizeRequest) -> list[list[int]]:
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Exactly one of prompt and messages must be given.")
        if body.messages is None:
            texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt or []
            if not texts:
                raise RequestError("prompt must hold at least one string.")
            return [await self._client.encode(text, body.add_special_tokens) for text in texts]
        text = conversation.render(
            self._template,
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
        return [await self._client.encode(text, add_special_tokens=False)]
