"""Servers and a router in one event loop: for tests of the router that need servers to behave badly on time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from aiohttp import web

from moonlang.entrypoints import front
from moonlang.router.app import Parts, build_app
from moonlang.router.args import RouterArgs
from moonlang.router.server import assembled

QUICK = {"health_check_interval_secs": 0.05, "retry_initial_backoff_ms": 1.0, "health_check_timeout_secs": 1.0}
Answer = Callable[["FakeWorker", web.Request, Any], Awaitable[web.StreamResponse]]


async def tell(worker: FakeWorker, request: web.Request, body: Any) -> web.StreamResponse:
    """The usual answer: the worker's name, at once, or as a stream of three events."""
    if not body.get("stream"):
        return web.json_response({"text": worker.name})
    return await stream(worker, request, 3)


async def stream(worker: FakeWorker, request: web.Request, events: int) -> web.StreamResponse:
    """So many events and a good end. With more than `worker.free_events` of them the rest waits for `worker.gate`."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for number in range(events):
        if number >= worker.free_events:
            await worker.gate.wait()
        await response.write(b"data: " + json.dumps({"text": worker.name, "number": number}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


class FakeWorker:
    """A server as the router sees it. answer: what it does with a generation; bodies: what it was sent; pages: what
    it answers to a GET of a path."""

    def __init__(self, name: str, mode: str = "null", answer: Answer = tell) -> None:
        self.name = name
        self.mode = mode
        self.answer = answer
        self.healthy = True
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.asked: list[str] = []
        self.pages: dict[str, Any] = {}
        self.raw_paths: list[str] = []
        self.free_events = 1 << 30
        self.gate = asyncio.Event()
        self.aborted = asyncio.Event()
        self.arrived = asyncio.Event()
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; on the port of before when there was one."""
        app = web.Application()
        app.router.add_post("/{path:generate|v1/.*|tokenize}", self._generate)
        app.router.add_route("*", "/{path:.*}", self._other)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Go, and break off what is under way."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.arrived.set()
        try:
            return await self.answer(self, request, self.bodies[-1])
        except asyncio.CancelledError:
            self.aborted.set()
            raise

    async def _other(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path_qs}")
        self.raw_paths.append(request.raw_path)
        if request.path == "/health":
            return web.Response(status=200 if self.healthy else 503)
        if request.path in self.pages:
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            return web.json_response(self.pages[request.path])
        if request.path == "/get_load":
            return web.json_response([{"dp_rank": 0, "num_tokens": 7}])
        return web.json_response(
            {"disaggregation_mode": self.mode, "disaggregation_bootstrap_port": 9000, "internal_states": [self.name]}
        )


@dataclass(frozen=True, slots=True)
class Routed:
    """A router that listens, and what is behind it."""

    http: httpx.AsyncClient
    parts: Parts
    workers: list[FakeWorker]

    async def until(self, true: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait for something to become true."""
        async with asyncio.timeout(timeout_s):
            while not true():
                await asyncio.sleep(0.005)

    async def metric(self, line: str) -> float:
        """The value of one line of /metrics."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return next((float(found.rpartition(" ")[2]) for found in lines if found.startswith(line + " ")), 0.0)


@asynccontextmanager
async def routed(*workers: FakeWorker, **flags: Any) -> AsyncIterator[Routed]:
    """A router in front of these workers, which are up."""
    async with AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.stop)
        args = RouterArgs(
            worker_urls=tuple(worker.url for worker in workers if worker.mode == "null"),
            prefill=tuple((worker.url, None) for worker in workers if worker.mode == "prefill"),
            decode=tuple(worker.url for worker in workers if worker.mode == "decode"),
            **{**QUICK, **flags},
        )
        listener = stack.enter_context(front.listening("127.0.0.1", 0))
        parts = await stack.enter_async_context(assembled(args))
        config = uvicorn.Config(build_app(parts), lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = front.Server(config)
        serving = asyncio.create_task(server.serve([listener]))

        async def stop() -> None:
            server.should_exit = True
            await serving

        stack.push_async_callback(stop)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=90))
        found = Routed(http, parts, list(workers))
        await found.until(lambda: all(worker.up for worker in parts.workers))
        yield found


def run_routed(case: Callable[[Routed], Awaitable[None]], *workers: Callable[[], FakeWorker], **flags: Any) -> None:
    """Run one test case. workers: made inside the event loop."""

    async def main() -> None:
        async with asyncio.timeout(120), routed(*(make() for make in workers), **flags) as found:
            await case(found)

    asyncio.run(main())
