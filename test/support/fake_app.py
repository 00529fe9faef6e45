"""The HTTP application over a FakeEngine, called without a socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine

from moonlang.config.server_args import ServerArgs
from moonlang.entrypoints import front
from moonlang.entrypoints.app import build_app
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.health import Health
from moonlang.text.chat_template import ChatTemplate

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Served:
    """One application and what is behind it."""

    http: httpx.AsyncClient
    engine: FakeEngine
    client: EngineClient
    health: Health


@asynccontextmanager
async def served(args: ServerArgs | None = None, *, metrics: bool = False, **model: Any) -> AsyncIterator[Served]:
    with FakeEngine() as engine:
        client = engine.client(args, metrics=metrics, **model)
        client.start(asyncio.get_running_loop())
        health = Health(client, timeout_s=0.5)
        health.state = "Up"
        app = build_app(client, ChatTemplate("", TEMPLATE, special_tokens={}), health)
        transport = httpx.ASGITransport(app=app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                yield Served(http, engine, client, health)
        finally:
            client.close()


@contextmanager
def served_on_port(args: ServerArgs) -> Iterator[str]:
    """The same behind a socket, for clients that need one; its URL."""
    found: Future[tuple[str, uvicorn.Server]] = Future()

    async def main() -> None:
        with FakeEngine() as engine, front.listening("127.0.0.1", 0) as listener:
            client = engine.client(args)
            client.start(asyncio.get_running_loop())
            app = build_app(client, ChatTemplate("", TEMPLATE, special_tokens={}), Health(client))
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
            found.set_result((f"http://127.0.0.1:{listener.getsockname()[1]}", server))
            await server.serve([listener])
            client.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="served")
    thread.start()
    url, server = found.result(60)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(60)


def run_served(case: Callable[[Served], Awaitable[None]], args: ServerArgs | None = None, **more: Any) -> None:
    """Run one test case against a fresh application."""

    async def main() -> None:
        async with served(args, **more) as found:
            await case(found)

    asyncio.run(asyncio.wait_for(main(), 120))


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream that has ended well, the terminator excluded."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
