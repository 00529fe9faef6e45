"""One exchange with one worker: a request out, its answer in as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from moonlang.base import clock
from moonlang.base.errors import PeerError
from moonlang.router.errors import RefusedError
from moonlang.router.workers import Worker

CONNECT_S = 3.0
KEEP_ALIVE_S = 4.0  # less than the 5 s after which SGLang's servers close an idle connection
# Belong to one connection, or are made anew for the next.
_OWN = frozenset(b"connection keep-alive te trailer transfer-encoding upgrade content-length".split())
_OWN_REQUEST = _OWN | {b"proxy-authorization", b"proxy-connection", b"host", b"expect", b"accept-encoding"}
_OWN_RESPONSE = _OWN | {b"date", b"server"}

Headers = list[tuple[bytes, bytes]]


def new_session() -> aiohttp.ClientSession:
    """Connections to all workers. No time limit but for connecting: answers take as long as they take."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept", "Content-Type"),
    )


def refuses(error: aiohttp.ClientConnectorError) -> bool:
    """Nobody listens there. Anything else may be a matter of this host, or of the network for a moment."""
    return isinstance(error.os_error, ConnectionRefusedError)


def forwarded(headers: Headers) -> dict[str, str]:
    """What of a client's headers goes on to a worker."""
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key not in _OWN_REQUEST}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request for any worker. path: with its query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Exchange:
    """One request to one worker. Whoever makes it closes it; closed early it closes its connection, which aborts it.

    failed: told of every failure that is the worker's. After `begin`: status, headers, the beginning of the body, and
    streaming: more of it is to come.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        worker: Worker,
        request: Outgoing,
        failed: Callable[[Worker, PeerError], None],
    ) -> None:
        self.worker = worker
        self.status = 0
        self.headers: Headers = []
        self.beginning = b""
        self.streaming = False
        self._session = session
        self._request = request
        self._failed = failed
        self._response: aiohttp.ClientResponse | None = None
        self._cut = False
        self._scope: asyncio.Timeout | None = None
        self._number = worker.begin(self._end_early)
        self._open = True

    async def begin(self) -> None:
        """Wait for the head of the answer, and for its first bytes: all of them unless it is an event stream.

        PeerError when the worker cannot be reached or breaks off.
        """
        try:
            async with asyncio.timeout(0 if self._cut else None) as self._scope:
                await self._begin()
        except TimeoutError:
            raise self._error() from None
        finally:
            self._scope = None

    async def _begin(self) -> None:
        out = self._request
        try:
            response = await self._session.request(
                out.method, self.worker.url + out.path, headers=out.headers, data=out.body, allow_redirects=False
            )
            self._response = response
            self.status = response.status
            self.headers = [
                (key.lower(), value) for key, value in response.raw_headers if key.lower() not in _OWN_RESPONSE
            ]
            self.streaming = response.content_type == "text/event-stream"
            self.beginning = await (response.content.readany() if self.streaming else response.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError) and refuses(error)
            kind = RefusedError if refused else PeerError
            raise self._error(kind(f"The worker {self.worker.url} cannot be reached.")) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._error() from error
        self.worker.heard_ns = clock.monotonic_ns()

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows the beginning, in the pieces in which it comes. PeerError when the worker breaks off."""
        if not self.streaming:
            return
        assert self._response is not None, "rest() comes after begin()"
        content, worker = self._response.content, self.worker
        try:
            while piece := await content.readany():
                worker.heard_ns = clock.monotonic_ns()
                yield piece
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._error() from error

    async def whole(self) -> bytes:
        """Begin, and read to the end: the body."""
        await self.begin()
        return self.beginning + b"".join([piece async for piece in self.rest()])

    def close(self) -> None:
        """The end. A connection whose answer has been read to its end is used again, another one is closed."""
        if self._open:
            self._open = False
            self.worker.end(self._number)
            if self._response is not None:
                self._response.close()

    def _end_early(self) -> None:
        """The worker is given up."""
        self._cut = True
        if self._response is not None:
            self._response.close()  # whoever reads from it is woken
        elif self._scope is not None:
            self._scope.reschedule(0)

    def _error(self, error: PeerError | None = None) -> PeerError:
        what = "does not answer any more" if self._cut else "broke off its answer"
        error = error or PeerError(f"The worker {self.worker.url} {what}.")
        self._failed(self.worker, error)
        return error
