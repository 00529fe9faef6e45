"""What the router says of itself and its workers, and how workers come and go while it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from moonlang.base import clock
from moonlang.base.errors import ConfigError, RequestError
from moonlang.entrypoints import exchange
from moonlang.entrypoints.exchange import json_response
from moonlang.observability.metrics import CONTENT_TYPE
from moonlang.router import errors
from moonlang.router.health import Watch
from moonlang.router.metrics import RouterMetrics
from moonlang.router.upstream import forwarded
from moonlang.router.workers import Kind, Worker, WorkerSet
from moonlang.version import __version__

QUESTION_S = 10.0  # how long a worker may take to say something of itself
FLUSH_S = 600.0


class NewWorker(msgspec.Struct, kw_only=True):
    """POST /workers. bootstrap_port: of a prefill server, which is asked for it if left out. name: for people."""

    url: str
    worker_type: Kind | None = None
    bootstrap_port: int | None = None
    name: Annotated[str, msgspec.Meta(max_length=128)] = ""


class AdminRoutes:
    """Routes that the router answers itself, some of them by asking all workers."""

    def __init__(
        self,
        workers: WorkerSet,
        watch: Watch,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        cluster_card: str | None = None,
    ) -> None:
        self._workers = workers
        self._watch = watch
        self._session = session
        self._metrics = metrics
        self._cluster_card = cluster_card

    def router(self) -> APIRouter:
        router = APIRouter(tags=["router"])
        for method, path, handler in (
            ("GET", "/", self.root),
            ("GET", "/liveness", self.root),
            ("GET", "/health", self.health),
            ("GET", "/readiness", self.health),
            ("GET", "/ready", self.health),
            ("GET", "/health_generate", self.health_generate),
            ("GET", "/server_info", self.server_info),
            ("GET", "/get_server_info", self.server_info),
            ("GET", "/get_load", self.get_load),
            ("GET", "/get_loads", self.get_loads),
            ("GET", "/flush_cache", self.flush_cache),
            ("POST", "/flush_cache", self.flush_cache),
            ("POST", "/abort_request", self.abort_request),
            ("GET", "/workers", self.list_workers),
            ("POST", "/workers", self.add_worker),
            ("GET", "/workers/{name:path}", self.show_worker),
            ("DELETE", "/workers/{name:path}", self.remove_worker),
            ("GET", "/metrics", self.metrics),
            ("GET", "/cluster", self.cluster),
        ):
            router.add_api_route(path, handler, methods=[method], response_model=None)
        return router

    async def root(self) -> Response:
        """The router runs, whatever its workers do."""
        return json_response("The MoonLang router is running")

    async def health(self) -> Response:
        """200 when a request could be served now."""
        lacking = self._workers.lacking(clock.monotonic_ns())
        if lacking:
            return errors.reply(503, errors.NO_WORKER, lacking)
        return json_response(
            {"status": "ready", "healthy_workers": len(self._up()), "total_workers": len(self._workers)}
        )

    async def health_generate(self, request: Request) -> Response:
        """200 when of every kind that a request needs some worker generates."""
        answers = await self._ask_all(request, "/health_generate")
        alive = {worker.kind for worker, answer in answers if answer is not None and answer[0] == 200}
        lacking = [kind for kind in self._workers.kinds if kind not in alive]
        if lacking:
            return errors.reply(503, errors.NO_WORKER, f"No {' and no '.join(lacking)} worker generates.")
        return Response(status_code=200)

    async def server_info(self, request: Request) -> Response:
        """What the workers say of themselves, by kind, and their `internal_states` one after the other."""
        answers = await self._ask_all(request, "/server_info")
        found: dict[str, Any] = {"version": __version__, "internal_states": []}
        found |= {kind: [] for kind in self._workers.kinds}
        for worker, answer in answers:
            info = _decoded(answer)
            if isinstance(info, dict):
                found[worker.kind].append(info)
                found["internal_states"] += info.get("internal_states") or []
        return json_response(found)

    async def get_load(self, request: Request) -> Response:
        """The loads of all workers in one list."""
        loads = [load for _, answer in await self._ask_all(request, "/get_load") for load in _decoded(answer) or ()]
        return json_response(loads)

    async def get_loads(self, request: Request) -> Response:
        """Tokens in use per worker; -1 when it does not say."""
        answers = await self._ask_all(request, "/get_load")
        return json_response(
            {"workers": [{"worker": worker.url, "load": _tokens(answer)} for worker, answer in answers]}
        )

    async def flush_cache(self, request: Request) -> Response:
        """Have all workers forget their cached prefixes."""
        return await self._tell_all(request, "flushed")

    async def abort_request(self, request: Request) -> Response:
        """End requests on all workers, as their own route of this name does."""
        return await self._tell_all(request, "told")

    async def list_workers(self) -> Response:
        """All workers and how they are."""
        stats = {f"{kind}_count": len(self._workers.of(kind)) for kind in ("prefill", "decode", "regular")}
        shown = [_shown(worker) for worker in self._workers]
        return json_response({"workers": shown, "total": len(shown), "stats": stats})

    async def add_worker(self, request: Request) -> Response:
        """A new worker. It gets requests as soon as it is up."""
        try:
            body = await exchange.read_json(request, NewWorker)
            kind = body.worker_type or self._workers.kinds[0]
            worker = self._workers.add(body.url, kind, body.bootstrap_port, body.name)
        except (RequestError, ConfigError) as error:
            return errors.response(RequestError(str(error)))
        self._watch.start(worker)
        found = {"status": "accepted", "worker_id": worker.id, "url": worker.url, "location": f"/workers/{worker.id}"}
        return json_response(found, 202)

    async def show_worker(self, name: str) -> Response:
        """One worker, by id or URL."""
        worker = self._workers.find(name)
        return _unknown(name) if worker is None else json_response(_shown(worker))

    async def remove_worker(self, name: str) -> Response:
        """A worker gets no more requests, and goes when those it has are done."""
        worker = self._workers.find(name)
        if worker is None:
            return _unknown(name)
        self._watch.dismiss(worker)
        return json_response({"status": "accepted", "worker_id": worker.id, "requests_left": worker.active}, 202)

    async def metrics(self) -> Response:
        """Prometheus metrics of the router; workers have their own."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def cluster(self) -> Response:
        """What a host must know to join: the card that the cluster's owner has written."""
        try:
            card = Path(self._cluster_card).read_bytes() if self._cluster_card else b""
        except OSError:
            card = b""
        if not card:
            return errors.reply(404, "no_cluster", "This router was not started by `moonlang up`.")
        return Response(card, media_type="application/json")

    def _up(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.up]

    async def _ask_all(
        self, request: Request, path: str, method: str = "GET", body: bytes = b"", limit_s: float = QUESTION_S
    ) -> list[tuple[Worker, tuple[int, bytes] | None]]:
        """Status and body of one request to every worker that is up; None for those that do not answer."""
        headers, limit = forwarded(request.scope["headers"]), aiohttp.ClientTimeout(total=limit_s)

        async def ask(worker: Worker) -> tuple[Worker, tuple[int, bytes] | None]:
            url = worker.url + path
            try:
                async with self._session.request(method, url, headers=headers, data=body, timeout=limit) as response:
                    return worker, (response.status, await response.read())
            except (aiohttp.ClientError, TimeoutError, OSError):
                return worker, None

        return await asyncio.gather(*map(ask, self._up()))

    async def _tell_all(self, request: Request, done: str) -> Response:
        """Pass a management call on to all workers. 200 when all agree, else what the first one that does not says."""
        query = request.url.query
        path = request.url.path + (f"?{query}" if query else "")
        try:
            body = await exchange.read_body(request)
        except RequestError as error:
            return errors.response(error)
        answers = await self._ask_all(request, path, "POST", body, FLUSH_S)
        for worker, answer in answers:
            if answer is None:
                return errors.reply(503, errors.FAILED, f"The worker {worker.url} did not answer.")
            if answer[0] >= 400:
                text = answer[1].decode(errors="replace").strip()
                return PlainTextResponse(f"Worker {worker.url}: {text}\n", answer[0])
        return json_response(
            {"status": "success", f"workers_{done}": len(answers), "total_workers": len(self._workers)}
        )


def _decoded(answer: tuple[int, bytes] | None) -> Any:
    """The JSON in a worker's answer; None when it is not a good one."""
    if answer is None or answer[0] != 200:
        return None
    try:
        return msgspec.json.decode(answer[1])
    except (msgspec.DecodeError, UnicodeError):
        return None


def _tokens(answer: tuple[int, bytes] | None) -> int:
    loads = _decoded(answer)
    if not isinstance(loads, list):
        return -1
    return sum(load.get("num_tokens", 0) for load in loads if isinstance(load, dict))


def _shown(worker: Worker) -> dict[str, Any]:
    now_ns = clock.monotonic_ns()
    return {
        "id": worker.id,
        "name": worker.name,
        "url": worker.url,
        "model_id": worker.facts.get("served_model_name") or worker.facts.get("model_path"),
        "worker_type": worker.kind,
        "is_healthy": worker.up,
        "is_usable": worker.usable(now_ns),
        "is_leaving": worker.leaving,
        "problem": worker.problem,
        "circuit_breaker": worker.breaker.state(now_ns),
        "load": worker.active,
        "bootstrap_port": worker.bootstrap_port,
        "connection_mode": "HTTP",
        "metadata": worker.facts,
    }


def _unknown(name: str) -> Response:
    return errors.reply(404, "worker_not_found", f"There is no worker {name[:256]!r}.")
