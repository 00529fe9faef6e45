"""Everything that is not generation: health, information, loads, cache, aborts, metrics. Older names are aliases."""

from __future__ import annotations

import itertools

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from moonlang.base.errors import RequestError
from moonlang.entrypoints import describe, errors, exchange, loads
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.exchange import json_response
from moonlang.entrypoints.health import Health
from moonlang.observability.metrics import CONTENT_TYPE

MANAGEMENT = frozenset({"/flush_cache", "/abort_request"})  # with --admin-api-key these need that key
MAX_FLUSH_WAIT_S = 600.0


class AbortBody(msgspec.Struct, kw_only=True):
    """POST /abort_request. rid is matched by its beginning."""

    rid: str | None = None
    abort_all: bool | None = None
    abort_message: str | None = None


class AdminRoutes:
    """Information about one server and its management."""

    def __init__(self, client: EngineClient, health: Health) -> None:
        self._client = client
        self._health = health

    def router(self) -> APIRouter:
        router = APIRouter(tags=["admin"])
        for paths, handler, methods in (
            (("/health",), self.health, ["GET"]),
            (("/health_generate",), self.health_generate, ["GET"]),
            (("/ready", "/ping"), self.ready, ["GET"]),
            (("/",), self.root, ["GET", "HEAD"]),
            (("/model_info", "/get_model_info"), self.model_info, ["GET"]),
            (("/server_info", "/get_server_info"), self.server_info, ["GET"]),
            (("/get_load",), self.get_load, ["GET"]),
            (("/v1/loads",), self.v1_loads, ["GET"]),
            (("/flush_cache",), self.flush_cache, ["GET", "POST"]),
            (("/abort_request",), self.abort_request, ["POST"]),
        ):
            for path, method in itertools.product(paths, methods):
                router.add_api_route(path, handler, methods=[method], response_model=None)
        if self._client.metrics is not None:
            router.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        return router

    async def health(self) -> Response:
        """200 when the engine answers."""
        alive = await self._health.probe() if self._health.generates else self._health.ready
        return Response(status_code=200 if alive else 503)

    async def health_generate(self) -> Response:
        """200 when the engine generates."""
        return Response(status_code=200 if await self._health.probe() else 503)

    async def ready(self) -> Response:
        """200 while requests are taken; does not ask the engine."""
        return Response(status_code=200 if self._health.ready else 503)

    async def root(self) -> Response:
        """A sentence for humans and probes."""
        return json_response("MoonLang is running")

    async def model_info(self) -> Response:
        """What is served."""
        return json_response(describe.model_info(self._client))

    async def server_info(self) -> Response:
        """Every resolved argument by name, sizes, and what the engine is doing."""
        status = "ready" if self._health.ready else self._health.state.lower()
        try:
            return json_response(await describe.server_info(self._client) | {"status": status})
        except RequestError as error:
            return json_response(errors.native(error), error.status)

    async def get_load(self) -> Response:
        """The load in its oldest form."""
        try:
            return json_response(loads.legacy(await loads.report(self._client)))
        except RequestError as error:
            return json_response(errors.native(error), error.status)

    async def v1_loads(self, request: Request) -> Response:
        """The load per replica, ?include= choosing sections."""
        query = request.query_params
        try:
            wanted = loads.sections(query.get("include"))
            only = loads.replica(query.get("dp_rank"), self._client)
            if query.get("format", "json") != "json":
                raise RequestError("format must be json; Prometheus values are on /metrics.")
            return json_response(loads.loads(self._client, await loads.report(self._client), wanted, only))
        except RequestError as error:
            return json_response(errors.native(error), error.status)

    async def flush_cache(self, request: Request) -> Response:
        """Forget all cached prefixes; ?timeout= is how many seconds to wait for the engine to be idle."""
        try:
            wait_s = _seconds(request.query_params.get("timeout"))
            reply = await self._client.control("flush_cache", {"timeout_s": wait_s}, timeout_s=wait_s + 10)
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        if reply.ok:
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse(f"Flush cache failed. {reply.message}\n", 400)

    async def abort_request(self, request: Request) -> Response:
        """End the requests whose id begins with `rid`, or all of them."""
        try:
            body = await exchange.read_json(request, AbortBody)
            if not body.rid and not body.abort_all:
                raise RequestError("Either rid or abort_all must be given.")
        except RequestError as error:
            return json_response(errors.native(error), error.status)
        self._client.abort(body.rid or "", bool(body.abort_all), (body.abort_message or "")[:1024])
        return Response(status_code=200)

    async def metrics(self) -> Response:
        """Prometheus metrics. An engine that does not answer leaves its own out."""
        metrics = self._client.metrics
        if metrics is None:
            return Response(status_code=404)
        try:
            elsewhere = await self._client.counted_elsewhere()
        except RequestError as error:  # without them counters would run backwards
            return json_response(errors.native(error), error.status)
        try:
            told = await loads.report(self._client)
            found = [told.get(replica, {}) for replica in range(self._client.replicas)]
        except RequestError:
            found = []
        return Response(metrics.render(found, elsewhere), media_type=CONTENT_TYPE)


def _seconds(text: str | None) -> float:
    """A query value in seconds."""
    try:
        value = float(text or 0)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_FLUSH_WAIT_S:
        raise RequestError(f"timeout must be a number of seconds in [0, {MAX_FLUSH_WAIT_S:g}], got {text!r:.64}.")
    return value
