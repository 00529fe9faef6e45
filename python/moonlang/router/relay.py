"""The way of a request through the router, as a bare ASGI application: nothing is added per piece of an answer."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from moonlang.base import clock
from moonlang.base.errors import PeerError, RequestError
from moonlang.entrypoints.exchange import read_body
from moonlang.router import body, errors
from moonlang.router.attempt import Answer, Call
from moonlang.router.body import Body
from moonlang.router.dispatch import Dispatcher
from moonlang.router.metrics import RouterMetrics
from moonlang.router.upstream import forwarded

BARE = Body(raw=b"", stream=False, prompt=b"", count=None, prompt_logprobs=False)


class Relay:
    """Passes requests on to workers and their answers back. A client that hangs up ends both halves of its request.

    generates: see Call. max_body_bytes: of a request; max_active: requests at once, -1 for no limit.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        *,
        generates: bool,
        max_body_bytes: int,
        max_active: int = -1,
    ) -> None:
        self._dispatcher = dispatcher
        self._generates = generates
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._max_active = max_active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._metrics
        try:
            if 0 <= self._max_active <= metrics.active:
                raise RequestError(f"The router has {metrics.active} requests under way already.", status=429)
            call = await self._read(scope, receive)
        except RequestError as error:
            await errors.response(error)(scope, receive, send)
            return
        metrics.active += 1
        metrics.started(call.route, call.body.stream)
        work = asyncio.create_task(self._serve(call, scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                metrics.aborted()
        finally:
            metrics.active -= 1
            gone.cancel()
            if work.cancel():
                await asyncio.wait((work,))

    async def _read(self, scope: Scope, receive: Receive) -> Call:
        query = scope["query_string"].decode("latin-1")
        raw = await read_body(Request(scope, receive), self._max_body_bytes)
        return Call(
            method=scope["method"],
            path=scope["raw_path"].decode("latin-1") + (f"?{query}" if query else ""),
            headers=forwarded(scope["headers"]),
            body=BARE if scope["method"] in ("GET", "HEAD") else body.read(raw),
            generates=self._generates,
        )

    async def _serve(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        start_ns = clock.monotonic_ns()
        try:
            answer = await self._dispatcher.answer(call)
        except (RequestError, PeerError) as error:
            response = errors.response(error)
            await response(scope, receive, send)
            self._metrics.ended(call.route, response.status_code, _since_s(start_ns))
            return
        self._metrics.first_byte(call.route, _since_s(start_ns))
        try:
            await _pass_on(answer, send)
        finally:
            answer.close()
            self._metrics.ended(call.route, answer.status, _since_s(start_ns))


async def _pass_on(answer: Answer, send: Send) -> None:
    headers = answer.headers
    if not answer.streaming:
        headers = [*headers, (b"content-length", b"%d" % len(answer.beginning))]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.beginning, "more_body": answer.streaming})
    if answer.streaming:
        end = b""
        try:
            async for piece in answer.rest:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except PeerError as error:
            end = errors.last_event(error)
        await send({"type": "http.response.body", "body": end, "more_body": False})
        answer.complete = not end
    else:
        answer.complete = True


async def _gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _since_s(start_ns: int) -> float:
    return (clock.monotonic_ns() - start_ns) / clock.NS_PER_S
