"""The asyncio front half of every server: sends requests to the scheduler, hands texts to whoever waits for them.

One reader callback on the endpoint's descriptor serves a whole step: it decodes one TextBatch, appends each delta to
the stream it belongs to, and wakes each stream's consumer once. Per token there is no task, no lock and no timer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moonlang.base import clock, log
from moonlang.base.errors import PeerError, RequestError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control, Generate, Reply, TextBatch, TextDelta
from moonlang.core.ports import Endpoint
from moonlang.core.request import Finish
from moonlang.core.sampling_parse import INT64_MAX
from moonlang.observability.metrics import ServerMetrics
from moonlang.observability.request_log import Finished, RequestLog
from moonlang.text.tokenizer import Tokenizer

_log = log.get(__name__)

SCHEDULER = "scheduler"
INLINE_ENCODE_CHARS = 4096  # longer prompts are tokenised on a thread, so that they hold up nobody's stream
ENCODE_THREADS = 2
HOPELESS_FACTOR = 4  # a prompt of so many times the characters that fit the context is not even tokenised


class _Live:
    """A sequence that has not finished. `stream` is None once its client is gone."""

    __slots__ = (
        *("cached", "first_ns", "index", "last_ns", "observed", "prompt", "queue_ns"),
        *("start_ns", "stream", "streaming", "tokens"),
    )

    def __init__(self, stream: Stream, index: int, message: Generate, observed: bool, now_ns: int) -> None:
        self.stream: Stream | None = stream
        self.index = index
        self.streaming = message.stream
        self.observed = observed
        self.start_ns = now_ns
        self.first_ns = 0
        self.last_ns = 0
        self.tokens = 0
        self.prompt = len(message.input_ids)
        self.cached = 0
        self.queue_ns = 0


class Stream:
    """What the sequences of one call say, as it arrives. For one consumer, which must `close` it (a `with` block does).

    It holds what the consumer has not taken yet: at most the whole output of its own sequences.
    """

    __slots__ = ("_client", "_ready", "_waiter", "_watcher", "closed", "open_count", "rids")

    def __init__(self, client: EngineClient, rids: list[str]) -> None:
        self._client = client
        self._watcher: asyncio.Task[None] | None = None
        self._ready: list[tuple[int, TextDelta]] = []
        self._waiter: asyncio.Future[None] | None = None
        self.rids = rids
        self.open_count = len(rids)
        self.closed = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """True when the last delta of every sequence has been taken."""
        return self.open_count == 0 and not self._ready

    async def next(self) -> list[tuple[int, TextDelta]]:
        """Everything that has come since the last call, as (index of the sequence, delta); waits for the first.

        Empty only after `close`, or when everything has been taken.
        """
        if not self._ready and self.open_count and not self.closed:
            self._waiter = self._client.loop.create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """Abort what still runs. Wakes a waiting consumer; may be called twice."""
        if self.closed:
            return
        self.closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        self._ready.clear()
        if self.open_count:
            self._client.forsake(self)
        self.wake()

    def close_after(self, gone: Coroutine[Any, Any, None]) -> None:
        """Close when `gone` returns; it is cancelled when the stream is closed before."""
        self._watcher = self._client.loop.create_task(gone)
        self._watcher.add_done_callback(lambda _: self.close())

    def put(self, index: int, delta: TextDelta) -> None:
        """Called by the client only."""
        self._ready.append((index, delta))
        if delta.finish is not None:
            self.open_count -= 1
        if self._waiter is not None:
            self.wake()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class EngineClient:
    """The one way from an event loop to the engine. All methods belong to the loop's thread, after `start`.

    endpoint: the mailbox "api". tokenizer: None under --skip-tokenizer-init. ready: what the roles reported when they
    came up. metrics, request_log: None when not wanted.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: Tokenizer | None,
        model: ModelConfig,
        args: ServerArgs,
        ready: dict[str, Any],
        *,
        metrics: ServerMetrics | None = None,
        request_log: RequestLog | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.args = args
        self.ready = ready
        self.metrics = metrics
        self._request_log = request_log
        self._observed = metrics is not None or request_log is not None
        self.start_s = clock.wall_s()
        self.failure = ""  # why the engine is gone
        self._endpoint = endpoint
        self._live: dict[str, _Live] = {}
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._next_control = 0
        self._random = random.Random(args.random_seed)
        self._longest_token = 0 if tokenizer is None else _longest_token(tokenizer)
        self._encoders = ThreadPoolExecutor(ENCODE_THREADS, "encode")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._output: asyncio.Future[None] | None = None  # resolved by the next TextBatch

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("EngineClient.start has not been called")
        return self._loop

    @property
    def live_count(self) -> int:
        """Sequences sent and not yet finished, those of clients that left included."""
        return len(self._live)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to read. Called once, in the loop's thread."""
        self._loop = loop
        loop.add_reader(self._endpoint.fileno(), self._on_readable)

    def close(self) -> None:
        """Stop reading and end every stream. The endpoint belongs to whoever opened it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._endpoint.fileno())
        self.fail("The server is shutting down.")
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def fail(self, why: str) -> None:
        """The engine is gone: end every stream with a 503 and refuse what comes later. The first reason stays."""
        if self.failure:
            return
        self.failure = why
        gone = Finish(kind="abort", message=why, status=503)
        live, self._live = self._live, {}
        for rid, sequence in live.items():
            if sequence.stream is not None:
                sequence.stream.put(sequence.index, TextDelta(rid=rid, text="", tokens=(), finish=gone))
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            if not reply.done():
                reply.set_exception(RequestError(why, status=503))

    def fresh_seed(self) -> int:
        """A seed for a request that names none; repeatable under --random-seed."""
        return self._random.randint(0, INT64_MAX)

    def fresh_rid(self) -> str:
        """32 hex digits."""
        return f"{random.getrandbits(128):032x}"

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with those that the tokenizer puts around one. Never blocks the loop long."""
        tokenizer = self.need_tokenizer()
        context = self.model.context_length
        if len(text) > HOPELESS_FACTOR * context * self._longest_token and not self.args.allow_auto_truncate:
            raise RequestError(
                f"The input (more than {context} tokens: {len(text)} characters) is longer than the model's context "
                f"length ({context} tokens)."
            )
        if len(text) <= INLINE_ENCODE_CHARS:
            return tokenizer.encode(text, add_special_tokens)
        return await self.loop.run_in_executor(self._encoders, tokenizer.encode, text, add_special_tokens)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. RequestError 400 on a server that runs without one."""
        if self.tokenizer is None:
            raise RequestError("This server has no tokenizer (--skip-tokenizer-init): send input_ids.")
        return self.tokenizer

    def token_text(self, token: int) -> str | None:
        """The text of one token by itself; null without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)

    def open(self, messages: Sequence[Generate], *, observed: bool = True) -> Stream:
        """Send the sequences of one call. RequestError 400 when a rid is in use, 503 when the engine cannot take them.

        observed: False keeps the server's own requests out of metrics and logs.
        """
        if self.failure:
            raise RequestError(self.failure, status=503)
        rids = [message.rid for message in messages]
        for rid in rids:
            if rid in self._live:
                raise RequestError(f"Request id {rid!r} is already in use.")
        if len(set(rids)) != len(rids):
            raise RequestError("Request ids of one call must differ.")
        now_ns = clock.monotonic_ns()
        stream = Stream(self, rids)
        for index, message in enumerate(messages):
            try:
                self._endpoint.send(SCHEDULER, message)
            except PeerError as error:
                stream.close()
                raise RequestError(f"The scheduler does not take requests: {error.message}", status=503) from error
            self._live[message.rid] = _Live(stream, index, message, observed, now_ns)
            if observed and self.metrics is not None:
                self.metrics.started(message.stream, message.sampling.grammar is not None)
            if observed and self._request_log is not None:
                self._request_log.received(message)
        return stream

    async def stream(self, message: Generate) -> AsyncIterator[TextDelta]:
        """One sequence; what came while the consumer was busy arrives as one delta. Closing early aborts it."""
        with self.open([message]) as stream:
            while not stream.finished:
                items = await stream.next()
                if items:
                    yield merge([delta for _, delta in items])

    def forsake(self, stream: Stream) -> None:
        """The consumer of `stream` is gone: abort its sequences. Their rids stay taken until the engine has let go."""
        for rid in stream.rids:
            live = self._live.get(rid)
            if live is not None and live.stream is stream:
                live.stream = None
                self._send_abort(Abort(rid=rid, exact=True))

    def abort(self, rid: str, every: bool = False, message: str = "") -> None:
        """Abort every request whose id starts with `rid`, or every request. Their streams end with an abort finish."""
        text = message or "Aborted by an abort request."
        self._send_abort(Abort(rid=rid, abort_all=every, message=text))

    async def control(self, verb: str, args: dict[str, Any] | None = None, timeout_s: float = 10) -> Reply:
        """One management call to the scheduler. RequestError 503 or 504 when it does not answer."""
        if self.failure:
            raise RequestError(self.failure, status=503)
        self._next_control += 1
        number = self._next_control
        reply: asyncio.Future[Reply] = self.loop.create_future()
        self._replies[number] = reply
        try:
            self._endpoint.send(SCHEDULER, Control(id=number, verb=verb, args=args or {}))  # type: ignore[arg-type]
            return await asyncio.wait_for(reply, timeout_s)
        except PeerError as error:
            raise RequestError(f"The scheduler does not take calls: {error.message}", status=503) from error
        except TimeoutError:
            raise RequestError(f"The scheduler did not answer {verb!r} within {timeout_s:g} s.", status=504) from None
        finally:
            self._replies.pop(number, None)

    async def output(self, timeout_s: float) -> bool:
        """Wait for any output of the engine; False when none came in time."""
        if self._output is None:
            self._output = self.loop.create_future()
        done, _ = await asyncio.wait([self._output], timeout=timeout_s)
        return bool(done)

    def _send_abort(self, message: Abort) -> None:
        if self.failure:
            return
        try:
            self._endpoint.send(SCHEDULER, message)
        except PeerError as error:
            _log.error("Abort of %s was not delivered: %s", message.rid or "everything", error)

    def _on_readable(self) -> None:
        while envelopes := self._endpoint.recv():
            for envelope in envelopes:
                body = envelope.body
                if isinstance(body, TextBatch):
                    self._deliver(body)
                elif isinstance(body, Reply):
                    reply = self._replies.get(body.id)
                    if reply is not None and not reply.done():
                        reply.set_result(body)

    def _deliver(self, batch: TextBatch) -> None:
        now_ns = clock.monotonic_ns()
        output, self._output = self._output, None
        if output is not None and not output.done():
            output.set_result(None)
        lives, observed = self._live, self._observed
        for delta in batch.items:
            live = lives.get(delta.rid)
            if live is None:
                continue  # the answer to an abort that crossed the end of its request
            if observed and live.observed:
                self._observe(live, delta, now_ns)
            if delta.finish is not None:
                del lives[delta.rid]
            if live.stream is not None:
                live.stream.put(live.index, delta)

    def _observe(self, live: _Live, delta: TextDelta, now_ns: int) -> None:
        """Count one delta. Times are taken where the text arrives, so they hold everything but the socket."""
        metrics = self.metrics
        if delta.head is not None:
            live.prompt, live.cached = delta.head.prompt_tokens, delta.head.cached_tokens
            live.queue_ns = delta.head.queue_ns
            if metrics is not None:
                metrics.queue_s.observe(delta.head.queue_ns / clock.NS_PER_S)
        count = len(delta.tokens)
        if count:
            if live.first_ns == 0:
                live.first_ns = now_ns
                if metrics is not None:
                    metrics.time_to_first_token_s.observe(live.streaming, (now_ns - live.start_ns) / clock.NS_PER_S)
            elif live.streaming and metrics is not None:
                metrics.inter_token_s.observe((now_ns - live.last_ns) / clock.NS_PER_S / count, count)
            live.last_ns = now_ns
            live.tokens += count
        if delta.finish is not None:
            self._observe_end(live, delta.rid, delta.finish, now_ns)

    def _observe_end(self, live: _Live, rid: str, finish: Finish, now_ns: int) -> None:
        e2e_s = (now_ns - live.start_ns) / clock.NS_PER_S
        if self._request_log is not None:
            ttft_s = (live.first_ns - live.start_ns) / clock.NS_PER_S if live.first_ns else None
            self._request_log.finished(
                Finished(
                    rid=rid,
                    finish=finish.kind,
                    message=finish.message,
                    prompt_tokens=live.prompt,
                    cached_tokens=live.cached,
                    completion_tokens=live.tokens,
                    queue_s=live.queue_ns / clock.NS_PER_S,
                    first_token_s=ttft_s,
                    e2e_s=e2e_s,
                )
            )
        if self.metrics is None:
            return
        if finish.kind == "abort":
            self.metrics.aborted()
            return
        self.metrics.ended(
            live.streaming,
            prompt=live.prompt,
            cached=live.cached,
            output=live.tokens,
            e2e_s=e2e_s,
            decode_s=(live.last_ns - live.first_ns) / clock.NS_PER_S,
        )


def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, at least 1."""
    return max(len(tokenizer.id_to_token(token) or "") for token in range(tokenizer.vocab_size)) or 1


def merge(deltas: list[TextDelta]) -> TextDelta:
    """Several deltas of one sequence, in order, as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return TextDelta(
        rid=last.rid,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish=last.finish,
        head=next((delta.head for delta in deltas if delta.head is not None), None),
        output=tuple(entry for delta in deltas for entry in delta.output),
        prompt=tuple(entry for delta in deltas for entry in delta.prompt),
        retractions=last.retractions,
    )
