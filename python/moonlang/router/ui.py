"""What the page at /ui is told of a router: each worker's own state, and what the router knows of it."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base import clock
from moonlang.base.errors import PeerError, RequestError
from moonlang.entrypoints.ui import site
from moonlang.router import errors
from moonlang.router.metrics import RouterMetrics
from moonlang.router.workers import Worker, WorkerSet
from moonlang.version import __version__

MOST_INSTANCES = 64  # that are asked and shown; the others are counted
STATE_S = 2.0  # how long a worker may take: the page asks every second
TREE_S = 10.0
MAX_ANSWER_BYTES = 16 << 20


class UiRoutes:
    """The data routes of the page, answered by asking the workers with the caller's key."""

    def __init__(self, workers: WorkerSet, session: aiohttp.ClientSession, metrics: RouterMetrics) -> None:
        self._workers = workers
        self._session = session
        self._metrics = metrics

    def router(self) -> APIRouter:
        router = APIRouter(tags=["ui"])
        router.add_api_route(site.STATE, self.state, methods=["GET"], response_model=None)
        router.add_api_route(site.TREE, self.tree, methods=["GET"], response_model=None)
        return router

    async def state(self, request: Request) -> Response:
        """All instances in one answer; of those that say nothing only what the router knows."""
        try:
            site.refuse_strangers(request)
        except RequestError as error:
            return errors.response(error)
        workers = list(self._workers)
        asked = workers[:MOST_INSTANCES]
        answers = await asyncio.gather(*(self._state_of(worker, request) for worker in asked))
        shown = [one for worker, found in zip(asked, answers, strict=True) for one in _instances(worker, found)]
        models = [found["model"] for found in answers if found]
        bounds = [found["bounds"] for found in answers if found]
        return site.answer(
            {
                "kind": "router",
                "version": __version__,
                "model": models[0] if models else "",
                "time_s": clock.wall_s(),
                "bounds": bounds[0] if bounds else {},
                "active": self._metrics.active,
                "instances": shown,
                "left_out": len(workers) - len(asked),
            }
        )

    async def tree(self, request: Request) -> Response:
        """The tree of one instance, by its id of `state`."""
        try:
            site.refuse_strangers(request)
            name, _, replica = request.query_params.get("instance", "").partition(".")
            worker = self._workers.find(name)
            if worker is None or not (replica or "0").isdecimal():
                raise RequestError("instance must be the id of an instance.", status=404)
            path = f"{site.TREE}?nodes={site.nodes_wanted(request)}&instance={replica or 0}"
            status, body = await self._get(worker, path, request, TREE_S)
        except (RequestError, PeerError) as error:
            return errors.response(error)
        return Response(body, status, {"cache-control": "no-store"}, "application/json")

    async def _state_of(self, worker: Worker, request: Request) -> dict[str, Any]:
        """What the worker says of itself; {} when it is down, slow, or another kind of server."""
        if not worker.up:
            return {}
        try:
            status, body = await self._get(worker, site.STATE, request, STATE_S)
            found = msgspec.json.decode(body) if status == 200 else {}
        except (PeerError, msgspec.DecodeError, UnicodeError):
            return {}
        known = isinstance(found, dict) and {"model", "bounds", "instances"} <= found.keys() and found["instances"]
        return found if known else {}

    async def _get(self, worker: Worker, path: str, request: Request, limit_s: float) -> tuple[int, bytes]:
        """Status and body, asked for with the caller's key. PeerError when there is no answer."""
        key = request.headers.get("authorization")
        headers = {} if key is None else {"authorization": key}
        limit = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with self._session.get(worker.url + path, headers=headers, timeout=limit) as response:
                body = await response.content.read(MAX_ANSWER_BYTES + 1)
                while len(body) <= MAX_ANSWER_BYTES and (more := await response.content.read(MAX_ANSWER_BYTES)):
                    body += more
                if len(body) > MAX_ANSWER_BYTES:
                    raise PeerError(f"The worker {worker.url} has too much to say.")
                return response.status, body
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PeerError(f"The worker {worker.url} does not answer.") from error


def _instances(worker: Worker, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A worker's own account, one per replica, under the router's name for it."""
    name = worker.url.partition("//")[2]
    unknown = {"load": None, "figures": None, "uptime_s": None, "limits": {}}
    replicas = found["instances"] if found else [unknown]
    known = {
        "kind": worker.kind,
        "up": worker.up,
        "problem": worker.problem,
        "leaving": worker.leaving,
        "breaker": worker.breaker.state(clock.monotonic_ns()),
        "active": worker.active,
    }
    if len(replicas) == 1:
        return [{**replicas[0], **known, "id": worker.id, "name": name}]
    return [
        {**one, **known, "id": f"{worker.id}.{number}", "name": f"{name} replica {number}"}
        for number, one in enumerate(replicas)
    ]
