"""What the page is told of one server: how busy it is and how quick, and which prefixes it holds."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moonlang.base import clock
from moonlang.base.errors import RequestError
from moonlang.entrypoints import errors, loads
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.describe import served_name
from moonlang.entrypoints.ui import site
from moonlang.observability.figures import BOUNDS_S
from moonlang.observability.pair_bounds import BOUNDS
from moonlang.version import __version__

TREE_AGE_S = 1.0  # a survey serves everybody who asks within this time
_TREE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Tree:
    """A survey of so many nodes that may still be shown."""

    nodes: int
    until_ns: int
    body: dict[str, Any]


class UiRoutes:
    """The two data routes of one server. The state is a few kilobytes; the tree has as many nodes as asked for."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._lock = asyncio.Lock()
        self._trees: dict[int, _Tree] = {}  # by replica

    def router(self) -> APIRouter:
        router = APIRouter(tags=["ui"])
        router.add_api_route(site.STATE, self.state, methods=["GET"], response_model=None)
        router.add_api_route(site.TREE, self.tree, methods=["GET"], response_model=None)
        return router

    async def state(self, request: Request) -> Response:
        """Loads, totals and latencies, in the shape of a cluster whose instances are the replicas."""
        try:
            site.refuse_strangers(request)
            instances = await self._instances()
        except RequestError as error:
            return site.answer(errors.native(error), error.status)
        client = self._client
        found = {
            "kind": "server",
            "version": __version__,
            "model": served_name(client.args, client.model),
            "time_s": clock.wall_s(),
            "bounds": {"seconds": BOUNDS_S, **BOUNDS},
            "instances": instances,
            "left_out": 0,
        }
        return site.answer(found)

    async def tree(self, request: Request) -> Response:
        """The biggest prefixes, with how they begin: prompts of other users, so it is a management route."""
        try:
            site.refuse_strangers(request)
            nodes = site.nodes_wanted(request)
            replica = loads.replica(request.query_params.get("instance", "0"), self._client) or 0
            async with self._lock:
                return site.answer(await self._survey(replica, nodes))
        except RequestError as error:
            return site.answer(errors.native(error), error.status)

    async def _instances(self) -> list[dict[str, Any]]:
        figures = self._client.look()
        return [
            self._instance(replica, load, figures[replica].report())
            for replica, load in (await loads.report(self._client)).items()
        ]

    def _instance(self, replica: int, load: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        client = self._client
        engine = client.ready.get("scheduler", {})
        mode = client.args.disaggregation_mode
        return {
            "id": str(replica),
            "name": f"replica {replica}" if client.replicas > 1 else "this server",
            "kind": "regular" if mode == "null" else mode,
            "up": True,
            "problem": "",
            "uptime_s": clock.wall_s() - client.start_s,
            "limits": {
                "max_running": engine.get("max_running_requests"),
                "context_length": client.model.context_length,
                "page_bytes": engine.get("kv_page_bytes"),
            },
            "load": load,
            "process": os.getpid(),  # of several HTTP processes each has counted its own requests
            "figures": figures,
        }

    async def _survey(self, replica: int, nodes: int) -> dict[str, Any]:
        last = self._trees.get(replica)
        if last is not None and last.nodes == nodes and clock.monotonic_ns() < last.until_ns:
            return last.body
        reply = await self._client.control_one(replica, "tree", {"nodes": nodes}, _TREE_TIMEOUT_S)
        if not reply.ok:
            raise RequestError(reply.message, status=503)
        found = dict(reply.body)
        found["page_size"] = self._client.page_size
        found["texts"] = [self._text(tokens) for tokens in found.pop("tokens")]
        until_ns = clock.monotonic_ns() + int(TREE_AGE_S * clock.NS_PER_S)
        self._trees[replica] = _Tree(nodes, until_ns, found)
        return found

    def _text(self, tokens: list[int]) -> str:
        tokenizer = self._client.tokenizer
        if tokenizer is None:
            return " ".join(map(str, tokens))
        return tokenizer.decode(tokens, skip_special_tokens=False)
