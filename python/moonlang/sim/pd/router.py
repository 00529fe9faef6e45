"""The clients' side: a router that has every request served by a pair of servers, tries again, merges answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from moonlang.base.clock import NS_PER_MS
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.pairing import PeerSpec
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.sim.agenda import Agenda
from moonlang.sim.client import Client
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.workload import Role, RouterSpec

PORT = 8998
RETRYABLE = 503
_BACKOFF_NS = 20 * NS_PER_MS
_NOBODY_TRIES = 50  # how often to look for a server that is up
_NOBODY_NS = 200 * NS_PER_MS


class Net(Protocol):
    """How the router reaches servers. latency_ns: of one HTTP message."""

    def latency_ns(self) -> int: ...
    def up(self, role: Role) -> Sequence[Server]:
        """The servers of a role whose process is there."""
        ...

    def deliver(self, client: Client, delta: TokenDelta) -> None: ...
    def ended(self, client: Client) -> None: ...
    def tell(self, *what: object) -> None: ...


@dataclass(slots=True)
class Attempt:
    """One pair at work on a request. prompt: log probabilities from the prefill half; last: the end of the answer,
    which waits for them; arrival_ns: when each half reaches its instance."""

    rid: str
    room: int
    number: int
    client: Client
    prefill: Server
    decode: Server
    arrival_ns: dict[str, int] = field(default_factory=dict)
    over: bool = False
    prefilled: bool = False
    prompt: list[TokenLogprob] = field(default_factory=list)
    last: TokenDelta | None = None


class Router:
    """`attempts`: all that have ever been made, by the id that the servers know them by."""

    def __init__(self, agenda: Agenda, rng: random.Random, spec: RouterSpec, net: Net) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.rooms: dict[int, Attempt] = {}
        self._agenda = agenda
        self._rng = rng
        self._spec = spec
        self._net = net
        self._current: dict[str, Attempt] = {}  # by the client's request id

    def submit(self, client: Client) -> None:
        self._attempt(client, 0, 0)

    def hang_up(self, client: Client) -> None:
        """The client is gone: so are both halves of its request."""
        if not client.is_done:
            client.stopped = True
            attempt = self._current.pop(client.script.rid, None)
            if attempt is not None:
                self._cancel(attempt)
            self._net.ended(client)

    # ---- what servers say

    def answered(self, server: Server, delta: TokenDelta) -> None:
        attempt = self.attempts[delta.rid]
        if attempt.over:
            return
        if server is attempt.decode:
            self._from_decode(attempt, delta)
        else:
            self._from_prefill(attempt, delta)

    def stopped(self, server: Server, rid: str) -> None:
        """The answer of this half has ended with a stop string."""
        attempt = self.attempts[rid]
        if server is not attempt.decode:
            attempt.prefilled = True
        elif not attempt.over:
            attempt.client.stopped = True
            self._end(attempt)

    def broken(self, server: Server) -> None:
        """The connections to this server are gone."""
        for attempt in list(self._current.values()):
            if not attempt.over and (attempt.decode is server or (attempt.prefill is server and not attempt.prefilled)):
                self._half_broken(attempt, server)

    # ---- one attempt

    def _attempt(self, client: Client, number: int, waited: int) -> None:
        if client.is_done:
            return
        prefills, decodes = self._net.up("prefill"), self._net.up("decode")
        if not prefills or not decodes:
            if waited < _NOBODY_TRIES:
                self._after(_NOBODY_NS, lambda: self._attempt(client, number, waited + 1))
            else:
                self._finish(client, Finish("abort", message="No server is up.", status=RETRYABLE))
            return
        room, script = self._rng.getrandbits(63), client.script
        prefill, decode = self._rng.choice(prefills), self._rng.choice(decodes)
        attempt = Attempt(f"{script.rid}~{number}", room, number, client, prefill, decode)
        self.attempts[attempt.rid] = self.rooms[room] = attempt  # type: ignore[assignment]
        self._current[script.rid] = attempt
        late = self._rng.choice((prefill, decode))
        for server in (prefill, decode):
            delay_ns = self._net.latency_ns() + (self._rng.randint(0, self._spec.late_ns) if server is late else 0)
            attempt.arrival_ns[server.instance] = self._agenda.now_ns + delay_ns
            self._after(delay_ns, lambda s=server: self._arrive(attempt, s))

    def _arrive(self, attempt: Attempt, server: Server) -> None:
        """One half of the request, which may have been given up meanwhile, has reached its server."""
        script, client = attempt.client.script, attempt.client
        if server.process.dead:
            if not attempt.over:
                self._half_broken(attempt, server)
            return
        if script.stop_at_tokens is not None:
            server.stop_at[attempt.rid] = script.stop_at_tokens
        message = Generate(
            rid=attempt.rid,
            input_ids=list(client.prompt),
            sampling=script.sampling,
            stream=script.stream,
            logprob=script.logprob,
            priority=script.priority,
            extra_key=script.extra_key,
            timeout_ms=script.timeout_ms,
            peer=PeerSpec(attempt.prefill.site.name, PORT, attempt.room),
        )
        server.process.after(0, lambda: server.add(message))

    def _from_prefill(self, attempt: Attempt, delta: TokenDelta) -> None:
        attempt.prompt += delta.prompt
        if delta.finish is None:
            return
        attempt.prefilled = True
        if delta.finish.kind == "abort" and self._spec.cancels:
            self._failed(attempt, delta.finish)
        elif attempt.last is not None:
            self._from_decode(attempt, attempt.last)

    def _from_decode(self, attempt: Attempt, delta: TokenDelta) -> None:
        client, finish = attempt.client, delta.finish
        if finish is not None and finish.kind == "abort":
            self._failed(attempt, finish, delta)
            return
        if finish is not None:
            wants_prompt = client.script.logprob is not None and client.script.logprob.start >= 0
            if wants_prompt and not attempt.prefilled:
                attempt.last = delta
                return
            own = client.prompt_logprobs + list(delta.prompt)
            if len(attempt.prompt) > len(own):
                client.prompt_logprobs.clear()
                delta = _with(delta, prompt=tuple(attempt.prompt))
        self._net.deliver(client, _with(delta, rid=client.script.rid))
        if finish is not None:
            self._end(attempt)

    def _half_broken(self, attempt: Attempt, server: Server) -> None:
        if server is attempt.prefill:
            attempt.prefilled = True
        if server is attempt.decode or self._spec.cancels:
            self._failed(attempt, Finish("abort", message="The server has closed the connection.", status=RETRYABLE))
        elif attempt.last is not None:
            self._from_decode(attempt, attempt.last)

    def _failed(self, attempt: Attempt, finish: Finish, delta: TokenDelta | None = None) -> None:
        """The pair has no answer: try another one unless the client has seen some of it or nothing can help."""
        client = attempt.client
        self._cancel(attempt)
        self._current.pop(client.script.rid, None)
        if finish.status == RETRYABLE and not client.tokens and attempt.number < self._spec.retries:
            client.head = None
            client.prompt_logprobs.clear()
            self._after(_BACKOFF_NS, lambda: self._attempt(client, attempt.number + 1, 0))
        else:
            self._finish(client, finish, delta)

    def _cancel(self, attempt: Attempt) -> None:
        """Close the connections to both halves."""
        attempt.over = True
        for server in (attempt.prefill, attempt.decode):
            sent_ns = max(self._agenda.now_ns, attempt.arrival_ns[server.instance])
            delay_ns = sent_ns - self._agenda.now_ns + self._net.latency_ns()
            self._after(delay_ns, lambda s=server: s.process.after(0, lambda: s.abort(attempt.rid)))

    def _end(self, attempt: Attempt) -> None:
        """The client has its answer."""
        attempt.over = True
        self._current.pop(attempt.client.script.rid, None)
        self._net.ended(attempt.client)

    def _finish(self, client: Client, finish: Finish, delta: TokenDelta | None = None) -> None:
        rid = client.script.rid
        if delta is None or (delta.head is not None and client.head is not None):
            delta = TokenDelta(rid, (), finish)
        self._net.deliver(client, _with(delta, rid=rid))
        self._net.ended(client)

    def _after(self, delay_ns: int, action: Callable[[], None]) -> None:
        self._agenda.at(self._agenda.now_ns + delay_ns, action)


def _with(delta: TokenDelta, **fields: object) -> TokenDelta:
    return msgspec.structs.replace(delta, **fields)
