"""POST /generate: the native call over HTTP."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base.errors import RequestError
from moonlang.core.messages import TextDelta
from moonlang.entrypoints import errors, exchange, generation
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.exchange import EventStream, json_response
from moonlang.entrypoints.generation import Answer, Call, GenerateBody


class NativeRoutes:
    """The native generation route of one server."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def router(self) -> APIRouter:
        router = APIRouter(tags=["native"])
        for method in ("POST", "PUT"):
            router.add_api_route("/generate", self.generate, methods=[method], response_model=None)
        return router

    async def generate(self, request: Request) -> Response:
        """One prompt or a batch of them, text or token ids, streamed or whole."""
        try:
            call = await generation.prepare(self._client, await exchange.read_json(request, GenerateBody))
            answers = call.answers(self._client)
            stream = exchange.watch(self._client.open(call.messages), request.receive)
            if call.stream:
                first = await exchange.begin(stream)
                return EventStream(stream, first, _Chunks(self._client, call, answers))
            await exchange.collect(stream, lambda index, delta: answers[index].add(delta))
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        bodies = [answer.body() for answer in answers]
        return json_response(bodies if call.batched else bodies[0])


class _Chunks:
    """Renders native chunks: one event per sequence that has something new, however many deltas that was."""

    def __init__(self, client: EngineClient, call: Call, answers: list[Answer]) -> None:
        self._call = call
        self._answers = answers
        self._incremental = client.args.incremental_streaming_output

    def render(self, items: list[tuple[int, TextDelta]]) -> bytes:
        touched: dict[int, None] = {}
        for index, delta in items:
            self._answers[index].add(delta)
            touched[index] = None
        chunks = (generation.chunk(self._call, self._answers, index, self._incremental) for index in touched)
        return b"".join(map(exchange.event, chunks))

    def end(self) -> bytes:
        return b""
