"""One HTTP exchange: a bounded JSON body in, a JSON body or an event stream out, and an eye on the client meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moonlang.base.errors import RequestError
from moonlang.core.messages import TextDelta
from moonlang.entrypoints import errors
from moonlang.entrypoints.stream import Stream

T = TypeVar("T")

MAX_BODY_BYTES = 16 << 20
DONE = b"data: [DONE]\n\n"


class Renderer(Protocol):
    """Turns deltas into the bytes of server-sent events."""

    def render(self, items: list[tuple[int, TextDelta]]) -> bytes: ...

    def end(self) -> bytes:
        """What follows the last delta, the terminator excluded."""
        ...


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The whole body. RequestError 413 as soon as it is known to be longer than `limit` bytes, 400 when cut off."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise RequestError("The client left before its request was complete.", status=errors.CLIENT_ABORT) from None
    return bytes(body)


def _too_large(limit: int) -> RequestError:
    return RequestError(f"The request body is larger than {limit >> 20} MiB.", status=413)


async def read_json(request: Request, kind: type[T]) -> T:
    """The body as `kind`. RequestError 400 on broken JSON, nesting without end, impossible numbers, wrong types."""
    body = await read_body(request)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise RequestError(f"The request body is not valid: {error}.") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RequestError(f"The request body is not JSON: {error}.") from None
    except RecursionError:
        raise RequestError("The request body is nested too deeply.") from None


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def watch(stream: Stream, receive: Receive) -> Stream:
    """From now on a client that hangs up closes `stream`, which aborts its sequences at once.

    receive: the ASGI callable of a request whose body has been read.
    """

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    stream.close_after(until_gone())
    return stream


async def collect(stream: Stream, add: Callable[[int, TextDelta], None]) -> None:
    """Feed all deltas of a call that does not stream to `add`, then close the stream.

    RequestError when the engine refuses one of its sequences, or when the client leaves.
    """
    with stream:
        while not stream.finished:
            for index, delta in await _next(stream):
                add(index, delta)


async def begin(stream: Stream) -> list[tuple[int, TextDelta]]:
    """The first deltas of a call that streams. An early refusal is raised, so that it gets its own HTTP status.

    The stream is left open for an EventStream, unless an error is raised.
    """
    try:
        return await _next(stream)
    except BaseException:
        stream.close()
        raise


async def _next(stream: Stream) -> list[tuple[int, TextDelta]]:
    items = await stream.next()
    if not items:
        raise RequestError("The client left.", status=errors.CLIENT_ABORT)
    for _, delta in items:
        if delta.finish is not None and (error := errors.of_finish(delta.finish)) is not None:
            raise error
    return items


class EventStream(Response):
    """Server-sent events without a task or a generator per event: what is ready goes out in one piece.

    items: the first deltas, already taken from `stream`.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, items: list[tuple[int, TextDelta]], renderer: Renderer) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._stream = stream
        self._items = items
        self._renderer = renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self._stream
        with stream:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            body = self._renderer.render(self._items)
            try:
                while not stream.finished:
                    if body:
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                    body = self._renderer.render(await _next(stream))
                body += self._renderer.end()
            except RequestError as error:
                body = event(errors.in_stream(error))
            await send({"type": "http.response.body", "body": body + DONE, "more_body": False})


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
