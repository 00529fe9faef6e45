"""One attempt to have a call answered: by one worker, or by a pair of them at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from moonlang.base import clock, log
from moonlang.base.errors import PeerError
from moonlang.router import body, merge
from moonlang.router.body import Body
from moonlang.router.errors import RefusedError
from moonlang.router.metrics import RouterMetrics
from moonlang.router.upstream import Exchange, Headers, Outgoing
from moonlang.router.workers import Worker

_log = log.get(__name__)

ROOMS = 1 << 63
BLAMED = frozenset({500, 502, 504})  # count against a worker; 503 says no more than that it is full
LINGER_S = 10.0  # what a prefill server gets to end its answer when the decode server has ended the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A client's request. path: with its query; headers: those that go on.

    generates: it needs one worker of each kind; otherwise one of any kind can answer it.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Body
    generates: bool

    @property
    def route(self) -> str:
        return self.path.partition("?")[0]


class Answer:
    """What the client gets: a beginning that is here, and a rest that comes when `streaming`. To be closed.

    complete: set by whoever has passed on all of it; closed before that, it is aborted on the workers.
    """

    def __init__(
        self,
        exchange: Exchange,
        close: Callable[[bool], None],
        *,
        beginning: bytes | None = None,
        rest: AsyncIterator[bytes] | None = None,
    ) -> None:
        self.status = exchange.status
        self.headers: Headers = exchange.headers
        self.beginning = exchange.beginning if beginning is None else beginning
        self.rest = exchange.rest() if rest is None else rest
        self.streaming = exchange.streaming
        self.complete = False
        self._close = close

    def close(self) -> None:
        self._close(self.complete)


class Attempts:
    """Makes attempts, and keeps count of what workers make of them."""

    def __init__(self, session: aiohttp.ClientSession, metrics: RouterMetrics) -> None:
        self._session = session
        self._metrics = metrics
        self._random = random.Random()
        self._lingering: set[asyncio.Task[None]] = set()

    async def single(self, call: Call, worker: Worker) -> Answer:
        """The answer of one worker. PeerError when it has none."""
        exchange = self._exchange(call, worker, call.body.raw)
        try:
            await exchange.begin()
        except BaseException:
            exchange.close()
            raise
        self._judge(exchange)
        return Answer(exchange, lambda complete: exchange.close())

    async def pair(self, call: Call, prefill: Worker, decode: Worker) -> Answer:
        """The answer of a pair: both get the request at once, decode answers. The first failure ends both.

        PeerError when one of them breaks off; an error that one of them answers is the answer.
        """
        batched = call.body.count is not None
        rooms = [self._random.randrange(ROOMS) for _ in range(call.body.count or 1)]
        raw = body.with_fields(call.body.raw, body.place(prefill.host, prefill.bootstrap_port, rooms, batched))
        merged = call.body.prompt_logprobs
        whole = body.with_fields(raw, {"stream": False}) if merged and call.body.stream else raw
        front, back = self._exchange(call, prefill, whole), self._exchange(call, decode, raw)
        fronting, backing = asyncio.create_task(front.whole()), asyncio.create_task(back.begin())

        def abort() -> None:
            for task, exchange in ((fronting, front), (backing, back)):
                task.cancel()
                task.add_done_callback(_seen)
                exchange.close()

        def close(complete: bool) -> None:
            back.close()
            if complete and not fronting.done():
                self._linger(front, fronting)
            else:
                abort()

        try:
            await asyncio.wait((fronting, backing), return_when=asyncio.FIRST_COMPLETED)
            if fronting.done():
                found = fronting.result()
                self._judge(front)
                if front.status >= 400:
                    backing.cancel()
                    back.close()
                    return Answer(front, lambda complete: abort(), beginning=found)
            await backing
            self._judge(back)
            if back.status >= 400:
                fronting.cancel()
                front.close()
                return Answer(back, lambda complete: abort())
            if merged:
                return await _completed(call, await fronting, back, close)
            return Answer(back, close)
        except BaseException:
            abort()
            raise

    def _exchange(self, call: Call, worker: Worker, raw: bytes) -> Exchange:
        out = Outgoing(call.method, call.path, call.headers, raw)
        return Exchange(self._session, worker, out, self._blame)

    def _judge(self, exchange: Exchange) -> None:
        """A worker has answered: well or not?"""
        self._metrics.answered(exchange.status)
        now_ns = clock.monotonic_ns()
        if exchange.status in BLAMED:
            exchange.worker.breaker.failed(now_ns)
        else:
            exchange.worker.breaker.succeeded(now_ns)

    def _blame(self, worker: Worker, error: PeerError) -> None:
        """A worker has broken off, or has not answered at all."""
        self._metrics.broken(worker.url)
        worker.breaker.failed(clock.monotonic_ns())
        worker.wanted.set()
        if isinstance(error, RefusedError) and worker.lost():
            _log.warning("Worker %s (%s) is down: it takes no connections", worker.url, worker.kind)

    def _linger(self, exchange: Exchange, task: asyncio.Task[bytes]) -> None:
        """Let an answer that nobody waits for come to its end, so that its connection can be used again."""

        async def wait() -> None:
            try:
                await asyncio.wait([task], timeout=LINGER_S)
            finally:
                task.cancel()
                task.add_done_callback(_seen)
                exchange.close()

        lingering = asyncio.create_task(wait())
        self._lingering.add(lingering)
        lingering.add_done_callback(self._lingering.discard)


async def _completed(call: Call, prefill: bytes, back: Exchange, close: Callable[[bool], None]) -> Answer:
    """The decode server's answer with the prefill server's log probabilities of the prompt."""
    fill = merge.filler(call.route, prefill)
    if not back.streaming:
        return Answer(back, close, beginning=merge.whole(fill, back.beginning))

    async def pieces() -> AsyncIterator[bytes]:
        yield back.beginning
        async for piece in back.rest():
            yield piece

    return Answer(back, close, beginning=b"", rest=merge.events(fill, pieces()))


def _seen(task: asyncio.Task[bytes] | asyncio.Task[None]) -> None:
    """Nobody waits for this task any more: its error is no news."""
    if not task.cancelled():
        task.exception()
