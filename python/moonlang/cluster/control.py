"""The line to a running cluster: one request in JSON, one answer, over a socket that only its user reaches."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec

from moonlang.base.errors import ConfigError, PeerError
from moonlang.cluster.status import Status

MAX_BYTES = 1 << 20
_SOCKET = "control.sock"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """status: how is it? wait: answer when it is ready, or ends. down: end. switch: give a server another role."""

    do: Literal["status", "wait", "down", "switch"]
    unit: str = ""
    role: str = ""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """error: why it was not done, "" when it was."""

    error: str = ""
    status: Status | None = None


Obey = Callable[[Order], Awaitable[Reply]]


class Line:
    """The end of the supervisor."""

    def __init__(self, folder: Path, obey: Obey) -> None:
        self._path = folder / _SOCKET
        self._obey = obey
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=MAX_BYTES)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):  # who asked is gone, or has sent too much
            try:
                reply = await self._obey(msgspec.json.decode(await reader.readline(), type=Order))
            except (msgspec.DecodeError, ConfigError, PeerError) as error:
                reply = Reply(error=str(error))
            writer.write(msgspec.json.encode(reply) + b"\n")
            await writer.drain()
        writer.close()


def ask(folder: Path, order: Order, timeout_s: float | None = 10.0) -> Reply:
    """Send an order and wait for the answer. PeerError when there is none; ConfigError when it is refused."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(timeout_s)
            line.connect(str(folder / _SOCKET))
            line.sendall(msgspec.json.encode(order) + b"\n")
            with line.makefile("rb") as answer:
                reply = msgspec.json.decode(answer.readline(MAX_BYTES), type=Reply)
    except (OSError, msgspec.DecodeError) as error:
        raise PeerError(f"The cluster does not answer: {error}.") from error
    if reply.error:
        raise ConfigError(reply.error)
    return reply
