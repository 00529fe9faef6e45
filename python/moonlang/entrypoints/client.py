"""The asyncio front half of every server: sends requests to the scheduler, hands texts to whoever waits for them.

One reader callback on the endpoint's descriptor serves a whole step: it decodes one TextBatch, appends each delta to
the stream it belongs to, and wakes each stream's consumer once. Per token there is no task, no lock and no timer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moonlang.base import clock, log
from moonlang.base.errors import PeerError, RequestError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control, Generate, Reply, TextBatch, TextDelta, Verb
from moonlang.core.ports import Endpoint
from moonlang.core.request import Finish
from moonlang.core.sampling_parse import INT64_MAX
from moonlang.entrypoints.live import Live, Watch
from moonlang.entrypoints.stream import Stream, merge
from moonlang.observability.metrics import ServerMetrics
from moonlang.observability.request_log import RequestLog
from moonlang.text.tokenizer import Tokenizer

_log = log.get(__name__)

SCHEDULER = "scheduler"
INLINE_ENCODE_CHARS = 4096  # longer prompts are tokenised on a thread, so that they hold up nobody's stream
ENCODE_THREADS = 2
HOPELESS_FACTOR = 4  # a prompt of so many times the characters that fit the context is not even tokenised


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
        self._watch = Watch(metrics, request_log) if metrics is not None or request_log is not None else None
        self.start_s = clock.wall_s()
        self.failure = ""  # why the engine is gone
        self._endpoint = endpoint
        self._live: dict[str, Live] = {}
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
        """Send the sequences of one call. RequestError 400 when a rid is in use, 503 when it cannot be taken now.

        observed: False keeps the server's own requests out of metrics and logs.
        """
        if self.failure:
            raise RequestError(self.failure, status=503)
        rids = [message.rid for message in messages]
        for rid in rids:
            live = self._live.get(rid)
            if live is not None and live.stream is None:  # a router that tries again is faster than the abort before it
                raise RequestError(f"Request id {rid!r} is being aborted.", status=503, hint="Try again soon.")
            if live is not None:
                raise RequestError(f"Request id {rid!r} is already in use.")
        if len(set(rids)) != len(rids):
            raise RequestError("Request ids of one call must differ.")
        now_ns = clock.monotonic_ns()
        stream = Stream(self.loop, rids, self._forsake)
        for index, message in enumerate(messages):
            try:
                self._endpoint.send(SCHEDULER, message)
            except PeerError as error:
                stream.close()
                raise RequestError(f"The scheduler does not take requests: {error.message}", status=503) from error
            except RequestError:  # a text in it cannot be sent
                stream.close()
                raise
            self._live[message.rid] = Live(stream, index, message, observed, now_ns)
            if observed and self._watch is not None:
                self._watch.started(message)
        return stream

    async def stream(self, message: Generate) -> AsyncIterator[TextDelta]:
        """One sequence; what came while the consumer was busy arrives as one delta. Closing early aborts it."""
        with self.open([message]) as stream:
            while not stream.finished:
                items = await stream.next()
                if items:
                    yield merge([delta for _, delta in items])

    def _forsake(self, stream: Stream) -> None:
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

    async def control(self, verb: Verb, args: dict[str, Any] | None = None, timeout_s: float = 10) -> Reply:
        """One management call to the scheduler. RequestError 503 or 504 when it does not answer."""
        if self.failure:
            raise RequestError(self.failure, status=503)
        self._next_control += 1
        number = self._next_control
        reply: asyncio.Future[Reply] = self.loop.create_future()
        self._replies[number] = reply
        try:
            self._endpoint.send(SCHEDULER, Control(id=number, verb=verb, args=args or {}))
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
        lives, watch = self._live, self._watch
        for delta in batch.items:
            live = lives.get(delta.rid)
            if live is None:
                continue  # the answer to an abort that crossed the end of its request
            if watch is not None and live.observed:
                watch.delta(live, delta, now_ns)
            if delta.finish is not None:
                del lives[delta.rid]
            if live.stream is not None:
                live.stream.put(live.index, delta)


def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, at least 1."""
    return max(len(tokenizer.id_to_token(token) or "") for token in range(tokenizer.vocab_size)) or 1
