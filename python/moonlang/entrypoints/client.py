"""The asyncio front half of every server: sends requests to a scheduler, hands texts to whoever waits for them.

One reader callback on the endpoint's descriptor serves a whole step: it decodes one TextBatch, appends each delta to
the stream it belongs to, and wakes each stream's consumer once. Per token there is no task, no lock and no timer.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from moonlang.base import clock, log
from moonlang.base.errors import PeerError, RequestError
from moonlang.config.experts import is_elastic
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control, FrontVerb, Generate, Reply, TextBatch, TextDelta, Verb
from moonlang.core.ports import Endpoint
from moonlang.core.request import Finish
from moonlang.core.sampling_parse import INT64_MAX
from moonlang.entrypoints.dispatch import Board, Dispatch
from moonlang.entrypoints.live import Live, Watch
from moonlang.entrypoints.stream import Stream, merge
from moonlang.observability.figures import Figures
from moonlang.observability.metrics import ServerMetrics
from moonlang.observability.request_log import RequestLog
from moonlang.roles import topology
from moonlang.text.tokenizer import Tokenizer

_log = log.get(__name__)

INLINE_ENCODE_CHARS = 4096  # longer prompts are tokenised on a thread, so that they hold up nobody's stream
ENCODE_THREADS = 2
LOOK_S = 30.0
HOPELESS_FACTOR = 4  # a prompt of so many times the characters that fit the context is not even tokenised


OnCall = Callable[[str, Control], None]  # told what another front asks, and which


class EngineClient:
    """The one way from an event loop to the engine. All methods belong to the loop's thread, after `start`.

    endpoint: the mailbox of this front, which is number `front` of them. board: what all fronts have sent. tokenizer:
    None under --skip-tokenizer-init. ready: what the roles reported when they came up. metrics, request_log: None when
    not wanted.
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
        front: int = 0,
        board: Board | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.args = args
        self.ready = ready
        self.metrics = metrics
        self._request_log = request_log
        self._watch = self._watching(None)
        self._looked_ns = 0
        self.start_s = clock.wall_s()
        self.failure = ""  # why the engine is gone
        self._endpoint = endpoint
        self._schedulers = topology.schedulers(args)
        method = "round_robin" if args.load_balance_method == "auto" else args.load_balance_method
        self._dispatch = Dispatch(method, len(self._schedulers), board=board, turn=front)
        self._front = front
        self.other_fronts = tuple(name for name in topology.fronts(args) if name != topology.front(front))
        self.command = sys.argv  # what the user has typed
        self.on_call: OnCall | None = None
        self._live: dict[str, Live] = {}
        self._replies: dict[int, tuple[str, asyncio.Future[Reply]]] = {}  # by number, with who is asked
        self.lost: list[str] = []  # roles that the server goes on without
        self._spares = is_elastic(args) and len(self._schedulers) > 1
        self._next_control = 0
        self._random = random.Random(f"{args.random_seed}/{front}" if front else args.random_seed)
        self._longest_token = 0 if tokenizer is None else _longest_token(tokenizer)
        self._encoders = ThreadPoolExecutor(ENCODE_THREADS, "encode")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awaited: dict[int, asyncio.Future[None]] = {}  # resolved by the next text of a replica

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("EngineClient.start has not been called")
        return self._loop

    @property
    def live_count(self) -> int:
        """Sequences sent and not yet finished, those of clients that left included."""
        return len(self._live)

    @property
    def page_size(self) -> int:
        """Tokens per page of the engine's KV pool."""
        return self.ready.get("scheduler", {}).get("page_size") or 1

    @property
    def replicas(self) -> int:
        """Copies of the model, each with a scheduler of its own."""
        return self._dispatch.size

    @property
    def living(self) -> tuple[int, ...]:
        """The replicas that are not lost."""
        return self._dispatch.living

    def is_busy(self, replica: int) -> bool:
        """Whether a replica has something to say."""
        return self._dispatch.shares[replica].requests > 0

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
        for _, reply in replies.values():
            if not reply.done():
                reply.set_exception(RequestError(why, status=503))

    def lose(self, role: str) -> None:
        """A role is lost, and the server goes on without it: what a replica had to do, others do from now on."""
        self.lost.append(role)
        if self.metrics is not None:
            self.metrics.lost_ranks = len(self.lost)
        if role not in self._schedulers:
            return
        replica = self._schedulers.index(role)
        self._dispatch.lose(replica)
        for asked, reply in self._replies.values():
            if asked == role and not reply.done():
                reply.set_exception(RequestError(f"The {role} is lost.", status=503))
        heard = self._awaited.pop(replica, None)
        if heard is not None:
            heard.set_result(None)
        for rid, live in list(self._live.items()):
            if live.replica == replica:
                self._hand_on(rid, live)

    def _hand_on(self, rid: str, live: Live) -> None:
        """Have another replica go on with a sequence; one whose client is gone ends here."""
        if live.stream is None or live.message is None or live.said is None:
            del self._live[rid]
            return
        left_ms = live.message.timeout_ms - (clock.monotonic_ns() - live.start_ns) // clock.NS_PER_MS
        live.message = msgspec.structs.replace(
            live.message,
            dp_rank=None,
            again=live.message.again + 1,
            said=tuple(live.said),
            timeout_ms=max(1, left_ms) if live.message.timeout_ms else 0,
        )
        try:
            live.replica = self._send(live.message, rid, len(live.said))
        except RequestError as error:
            del self._live[rid]
            gone = Finish(kind="abort", message=error.message, status=error.status)
            live.stream.put(live.index, TextDelta(rid=rid, text="", tokens=(), finish=gone))

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
        rids = [self._known_as(message.rid) for message in messages]
        for message, rid in zip(messages, rids, strict=True):
            live = self._live.get(rid)
            if live is not None and live.stream is None:  # a router that tries again is faster than the abort before it
                raise RequestError(f"Request id {message.rid!r} is being aborted.", status=503, hint="Try again soon.")
            if live is not None:
                raise RequestError(f"Request id {message.rid!r} is already in use.")
        if len(set(rids)) != len(rids):
            raise RequestError("Request ids of one call must differ.")
        now_ns = clock.monotonic_ns()
        stream = Stream(self.loop, rids, self._forsake)
        for index, message in enumerate(messages):
            try:
                replica = self._send(message, rids[index])
            except RequestError:  # also when a text in it cannot be sent
                stream.close()
                raise
            watch = self._watch if observed else None
            live = self._live[rids[index]] = Live(stream, index, message, watch is not None, now_ns, replica)
            if self._spares:
                live.message, live.said = message, []
            if watch is not None:
                watch.started(message)
        return stream

    async def stream(self, message: Generate) -> AsyncIterator[TextDelta]:
        """One sequence; what came while the consumer was busy arrives as one delta. Closing early aborts it."""
        with self.open([message]) as stream:
            while not stream.finished:
                items = await stream.next()
                if items:
                    yield merge([delta for _, delta in items])

    def _known_as(self, rid: str) -> str:
        """The id of a request of ours within the engine."""
        return topology.owned(rid, self._front) if self.other_fronts else rid

    def _send(self, message: Generate, rid: str, said: int = 0) -> int:
        """Hand a sequence to a replica, and return which. said: of its tokens. RequestError: that cannot be done."""
        tries = len(self._dispatch.living) if self._spares else 1  # one may be lost, although nobody has said so yet
        while True:
            tries -= 1
            replica = self._dispatch.choose(message)
            try:
                self._endpoint.send(self._schedulers[replica], self._addressed(message, rid, replica))
                break
            except PeerError as error:
                if tries <= 0:
                    text = f"The scheduler does not take requests: {error.message}"
                    raise RequestError(text, status=503) from error
        self._dispatch.began(replica, len(message.input_ids) + said)
        return replica

    def _addressed(self, message: Generate, rid: str, replica: int) -> Generate:
        """As the engine gets it."""
        if self.replicas == 1 and rid == message.rid:
            return message
        return msgspec.structs.replace(message, rid=rid, dp_rank=replica if self.replicas > 1 else None)

    def _forsake(self, stream: Stream) -> None:
        """The consumer of `stream` is gone: abort its sequences. Their rids stay taken until the engine has let go."""
        for rid in stream.rids:
            live = self._live.get(rid)
            if live is not None and live.stream is stream:
                live.stream = None
                self._send_abort(Abort(rid=rid, exact=True), self._schedulers[live.replica])

    def abort(self, rid: str, every: bool = False, message: str = "") -> None:
        """Abort every request whose id starts with `rid`, or every request. Their streams end with an abort finish."""
        text = message or "Aborted by an abort request."
        for replica in self._dispatch.living:
            self._send_abort(Abort(rid=rid, abort_all=every, message=text), self._schedulers[replica])

    async def control(self, verb: Verb, args: dict[str, Any] | None = None, timeout_s: float = 10) -> Reply:
        """One management call to all replicas: the reply of the first that refuses it, or else of the first.

        RequestError 503 or 504 when one does not answer.
        """
        replies = list((await self.controls(verb, args, timeout_s)).values())
        return next((reply for reply in replies if not reply.ok), replies[0])

    async def controls(self, verb: Verb, args: dict[str, Any] | None = None, timeout_s: float = 10) -> dict[int, Reply]:
        """The same, with the replies of all replicas that live, in their order."""
        asked = self._dispatch.living
        calls = (self.ask(self._schedulers[replica], verb, args, timeout_s) for replica in asked)
        replies = await asyncio.gather(*calls, return_exceptions=True)
        found: dict[int, Reply] = {}
        for replica, reply in zip(asked, replies, strict=True):
            if isinstance(reply, Reply):
                found[replica] = reply
            elif replica in self._dispatch.living:
                raise reply
        return found

    async def control_one(self, replica: int, verb: Verb, args: dict[str, Any], timeout_s: float = 10) -> Reply:
        """One management call to one replica."""
        return await self.ask(self._schedulers[replica], verb, args, timeout_s)

    async def ask(
        self, role: str, verb: Verb | FrontVerb, args: dict[str, Any] | None = None, timeout_s: float = 10
    ) -> Reply:
        """One call to one role: a scheduler or another front. RequestError 503 or 504 when it does not answer."""
        if self.failure:
            raise RequestError(self.failure, status=503)
        self._next_control += 1
        number = self._next_control
        reply: asyncio.Future[Reply] = self.loop.create_future()
        self._replies[number] = role, reply
        try:
            self._endpoint.send(role, Control(id=number, verb=verb, args=args or {}))
            return await asyncio.wait_for(reply, timeout_s)
        except PeerError as error:
            raise RequestError(f"The {role} does not take calls: {error.message}", status=503) from error
        except TimeoutError:
            raise RequestError(f"The {role} did not answer {verb!r} within {timeout_s:g} s.", status=504) from None
        finally:
            self._replies.pop(number, None)

    def tell_fronts(self, verb: FrontVerb, args: dict[str, Any]) -> None:
        """Tell the other fronts what has become of the engine."""
        for role in self.other_fronts:
            try:
                self._endpoint.send(role, Control(id=0, verb=verb, args=args))
            except PeerError as error:  # it may be the one that is gone
                _log.warning("%s was not told: %s", role, error.message)

    def reply(self, to: str, call: Control, body: dict[str, Any] | None = None) -> None:
        """Answer a call of another front."""
        try:
            self._endpoint.send(to, Reply(id=call.id, ok=True, body=body or {}))
        except PeerError as error:
            _log.error("The answer to %r of %s was not delivered: %s", call.verb, to, error)

    async def counted_elsewhere(self) -> list[dict[str, Any]]:
        """The metrics of all other fronts. RequestError 503 or 504 when one does not answer."""
        replies = await asyncio.gather(*(self.ask(role, "metrics") for role in self.other_fronts))
        return [reply.body for reply in replies]

    async def output(self, replica: int, timeout_s: float) -> bool:
        """Wait for any output of a replica; False when none came in time."""
        awaited = self._awaited.get(replica)
        if awaited is None:
            awaited = self._awaited[replica] = self.loop.create_future()
        done, _ = await asyncio.wait([awaited], timeout=timeout_s)
        return bool(done)

    def look(self) -> Sequence[Figures]:
        """Latencies by replica, from the first look on; they are forgotten when nobody has looked for LOOK_S."""
        self._looked_ns = clock.monotonic_ns()
        figures = self._watch.figures if self._watch is not None else None
        if figures is None:
            figures = [Figures() for _ in range(self.replicas)]
            self._watch = self._watching(figures)
            self.loop.call_later(LOOK_S, self._look_away)
        return figures

    def _look_away(self) -> None:
        if clock.monotonic_ns() - self._looked_ns < LOOK_S * clock.NS_PER_S:
            self.loop.call_later(LOOK_S, self._look_away)
        else:
            self._watch = self._watching(None)

    def _watching(self, figures: Sequence[Figures] | None) -> Watch | None:
        """Who observes requests; None when nobody wants to know: it costs a little per token."""
        wanted = (self.metrics, self._request_log, figures)
        return None if all(one is None for one in wanted) else Watch(*wanted)

    def _send_abort(self, message: Abort, scheduler: str) -> None:
        if self.failure:
            return
        try:
            self._endpoint.send(scheduler, message)
        except PeerError as error:
            _log.error("Abort of %s was not delivered: %s", message.rid or "everything", error)

    def _on_readable(self) -> None:
        while envelopes := self._endpoint.recv():
            for envelope in envelopes:
                body = envelope.body
                if isinstance(body, TextBatch):
                    self._deliver(body)
                elif isinstance(body, Reply):
                    _, reply = self._replies.get(body.id, ("", None))
                    if reply is not None and not reply.done():
                        reply.set_result(body)
                elif isinstance(body, Control):
                    self._answer(envelope.source, body)

    def _answer(self, source: str, call: Control) -> None:
        """Another front asks something."""
        if call.verb == "metrics":
            self.reply(source, call, self.metrics.numbers() if self.metrics is not None else {})
        elif call.verb == "lose":
            self.lose(str(call.args["role"]))
        elif self.on_call is not None:
            self.on_call(source, call)

    def _deliver(self, batch: TextBatch) -> None:
        now_ns = clock.monotonic_ns()
        lives, watch, dispatch, awaited = self._live, self._watch, self._dispatch, self._awaited
        for delta in batch.items:
            live = lives.get(delta.rid)
            if live is None:
                continue  # the answer to an abort that crossed the end of its request
            if awaited and (heard := awaited.pop(live.replica, None)) is not None:
                heard.set_result(None)
            if watch is not None and live.observed:
                watch.delta(live, delta, now_ns)
            if delta.tokens:
                live.size += len(delta.tokens)
                dispatch.grew(live.replica, len(delta.tokens))
                if live.said is not None:
                    live.said += delta.tokens
            if delta.finish is not None:
                del lives[delta.rid]
                dispatch.ended(live.replica, live.size)
                if live.message is not None and live.message.again:  # it may have ended before it was sent again
                    self._send_abort(Abort(rid=delta.rid, exact=True), self._schedulers[live.replica])
            if live.stream is not None:
                live.stream.put(live.index, delta)


def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, at least 1."""
    return max(len(tokenizer.id_to_token(token) or "") for token in range(tokenizer.vocab_size)) or 1
