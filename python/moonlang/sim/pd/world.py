"""The event loop of several servers. Everything that happens follows from the `PdCase`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from moonlang.base.clock import NS_PER_MS
from moonlang.core.messages import TokenDelta
from moonlang.core.pairing import KvCard, PairEvent, PairMessage
from moonlang.core.plan import StepPlan
from moonlang.core.request import Finish
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim.agenda import Agenda
from moonlang.sim.chain import ChainModel
from moonlang.sim.client import Client
from moonlang.sim.pd.network import Network
from moonlang.sim.pd.router import PORT, RETRYABLE, Router
from moonlang.sim.pd.server import Server
from moonlang.sim.pd.transfer import Target
from moonlang.sim.pd.workload import Fault, PdCase, Role, Site
from moonlang.sim.stage import Checker, Stage
from moonlang.sim.violation import Violation
from moonlang.sim.workload import Script

_LONGEST_NS = 600_000 * NS_PER_MS


class PairChecker(Protocol):
    """Looks on at all servers and raises Violation.

    said, heard: a scheduler has a message for its peer, or is about to be told of an event. written: `server` has
    written to `page` of `target` for `room`.
    """

    def on_said(self, world: PdWorld, server: Server, instance: str, body: PairMessage, /) -> None: ...
    def on_heard(self, world: PdWorld, server: Server, event: PairEvent, /) -> None: ...
    def on_written(self, world: PdWorld, server: Server, target: Server, room: int, page: int, /) -> None: ...
    def on_plan(self, world: PdWorld, server: Server, plan: StepPlan, /) -> None: ...
    def on_step(self, world: PdWorld, server: Server, /) -> None: ...
    def at_end(self, world: PdWorld, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchers:
    """The checkers of one run. server: makes those of one server."""

    server: Callable[[], Sequence[Checker[Stage]]] = tuple
    pairs: Sequence[PairChecker] = ()
    clients: Sequence[Checker[PdWorld]] = ()


class PdWorld:
    """One case, run once. `make_scheduler` exists for mutants."""

    def __init__(
        self,
        case: PdCase,
        watchers: Watchers = Watchers(),
        make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.case = case
        self.clients: dict[str, Client] = {}
        self.servers: dict[str, Server] = {}  # by instance, also those that are dead
        self.steps = 0
        self._watchers = watchers
        self._make_scheduler = make_scheduler
        self._trace = trace
        self._agenda = Agenda()
        self._rng = random.Random(f"pd world {case.seed}")
        self._network = Network(self._agenda, self._rng, case.net, self.tell)
        self.router = Router(self._agenda, self._rng, case.router, self)
        self._digest = hashlib.blake2b(digest_size=16)
        self._sites = {site.name: site for site in case.sites}
        self._at_site: dict[str, Server] = {}
        self._followers: dict[int, list[Script]] = {}
        self._struck: dict[str, None] = {}  # sites that something has happened to
        self.calm_ns = 0  # since when nothing is in the way any more
        for site in case.sites:
            self._start(site, 0)
        for script in case.scripts:
            if script.parent is None:
                self._agenda.at(script.at_ns, lambda s=script: self._send(s, s.prompt))
            else:
                self._followers.setdefault(script.parent, []).append(script)
        for fault in case.faults:
            self._agenda.at(fault.at_ns, lambda f=fault: self._strike(f))

    @property
    def now_ns(self) -> int:
        return self._agenda.now_ns

    @property
    def model(self) -> ChainModel:
        return self.case.model

    @property
    def page_size(self) -> int:
        return self.case.schema.page_size

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have; every pool has room for them."""
        return self.case.sites[0].config.context_length

    def excuse(self, client: Client, finish: Finish) -> bool:
        """Whether there has been cause for this end of a request."""
        if finish.status == RETRYABLE:
            return self._is_struck(client)
        return client.excuses(finish, now_ns=self.now_ns, longest=self.longest)

    @property
    def digest(self) -> str:
        """A hash over every plan, every message and every delta so far."""
        return self._digest.hexdigest()

    def run(self) -> None:
        """Until nothing is left to happen; Violation at the first thing that is wrong."""
        while self._agenda.next_ns is not None:
            self.steps += 1
            self._agenda.run_one()
            if self.now_ns > _LONGEST_NS:
                raise Violation("liveness", "the run does not end within ten virtual minutes")
        for server in self.living():
            for checker in server.checkers:
                checker.at_end(server)
        for checker in self._watchers.clients:
            checker.at_end(self)
        for checker in self._watchers.pairs:
            checker.at_end(self)

    def living(self) -> list[Server]:
        return list(self._at_site.values())

    # ---- servers: `server.Host`

    def find(self, card: KvCard) -> Target | None:
        server = self.servers[card.instance]
        return None if server.process.dead else Target(server.cells, server.process)

    def written(self, server: Server, card: KvCard, room: int, page: int) -> None:
        target = self.servers[card.instance]
        self.tell(server.instance, "writes to page", page, "of", target.instance, "for room", room)
        for checker in self._watchers.pairs:
            checker.on_written(self, server, target, room, page)

    def said(self, server: Server, instance: str, body: PairMessage) -> None:
        self.tell(server.instance, "says to", instance, body)
        self._digest.update(msgspec.msgpack.encode(body))
        for checker in self._watchers.pairs:
            checker.on_said(self, server, instance, body)

    def heard(self, server: Server, event: PairEvent) -> None:
        for checker in self._watchers.pairs:
            checker.on_heard(self, server, event)

    def planned(self, server: Server, plan: StepPlan) -> None:
        self.tell(server.instance, "plan", plan)
        self._digest.update(msgspec.msgpack.encode(plan))
        for checker in self._watchers.pairs:
            checker.on_plan(self, server, plan)

    def stepped(self, server: Server) -> None:
        for checker in self._watchers.pairs:
            checker.on_step(self, server)

    def answered(self, server: Server, delta: TokenDelta) -> None:
        self.tell(server.instance, "answers", delta)
        self.router.answered(server, delta)

    def stopped(self, server: Server, rid: str) -> None:
        self.tell(server.instance, "stops", rid)
        self.router.stopped(server, rid)

    # ---- clients: `router.Net`

    def latency_ns(self) -> int:
        return self._network.latency_ns()

    def up(self, role: Role) -> list[Server]:
        return [server for server in self.living() if server.site.role == role]

    def deliver(self, client: Client, delta: TokenDelta) -> None:
        self.tell("client", delta)
        self._digest.update(msgspec.msgpack.encode(delta))
        for checker in self._watchers.clients:
            checker.on_delta(self, delta)
        client.take(delta)
        most = client.script.abort_at_tokens
        if delta.finish is None and most is not None and len(client.tokens) >= most:
            self._agenda.at(self.now_ns, lambda: self._hang_up(self._group(client.script)))

    def ended(self, client: Client) -> None:
        for script in self._followers.get(client.script.index, ()):
            prompt = client.prompt + tuple(client.tokens) + script.prompt
            self._agenda.at(self.now_ns + script.at_ns, lambda s=script, p=prompt: self._send(s, p))

    def tell(self, *what: object) -> None:
        if self._trace is not None:
            self._trace(f"{self.now_ns / NS_PER_MS:12.3f} ms  {' '.join(map(str, what))}")

    def _send(self, script: Script, prompt: tuple[int, ...]) -> None:
        self.tell("client sends", script.rid, prompt)
        client = self.clients[script.rid] = Client(script, prompt, self.now_ns)
        if script.abort_after_ns is not None:
            self._agenda.at(self.now_ns + script.abort_after_ns, lambda: self._hang_up(self._group(script)))
        self.router.submit(client)

    def _group(self, script: Script) -> list[Client]:
        """The client of a request, or those of all samples of its prompt."""
        name = script.rid.split("-")[0] + "-" if script.abort_group else script.rid
        return [client for client in self.clients.values() if client.script.rid.startswith(name)]

    def _hang_up(self, clients: Sequence[Client]) -> None:
        for client in clients:
            self.tell("client hangs up", client.script.rid)
            client.hung_up_ns = self.now_ns if client.hung_up_ns is None else client.hung_up_ns
            self.router.hang_up(client)

    # ---- what goes wrong

    def _is_struck(self, client: Client) -> bool:
        """Whether something has happened to this client's request for which it may have to be sent again."""
        case, script = self.case, client.script
        if case.is_unreliable:
            return True
        if script.timeout_ms and self.now_ns >= client.sent_ns + script.timeout_ms * NS_PER_MS * 4 // 5:
            return True  # the other half has given up a moment before
        tried = [a for a in self.router.attempts.values() if a.client is client]
        alone = all(attempt.decode.site.pairing.fallback for attempt in tried) and not case.router.cancels
        halves = [(a.decode,) if alone else (a.decode, a.prefill) for a in tried]
        return not tried or any(server.site.name in self._struck for pair in halves for server in pair)

    def _start(self, site: Site, generation: int) -> None:
        server = Server(
            self,
            self.case,
            site,
            generation,
            self._agenda,
            self._network,
            self._make_scheduler,
            self._watchers.server(),
        )
        self.tell(server.instance, "starts")
        self.servers[server.instance] = self._at_site[site.name] = server
        self._network.sites[site.name, PORT] = server.link

    def _strike(self, fault: Fault) -> None:
        server = self._at_site.get(fault.site)
        if server is None:
            return
        self.tell(fault)
        self._struck.update(dict.fromkeys((fault.site, fault.peer)))
        self.calm_ns = max(self.calm_ns, self.now_ns + fault.duration_ns)
        match fault.kind:
            case "router":
                self._hang_up(list(self.clients.values()))
            case "kill":
                self._kill(server, fault.duration_ns)
            case "hang":
                self._hang(server, fault.duration_ns)
            case _:
                peer = self._at_site.get(fault.peer)
                connection = server.link.connections.get(peer.instance) if peer is not None else None
                if connection is not None and fault.kind == "reset":
                    self._network.reset(connection)
                elif connection is not None:
                    self._network.clog(connection, fault.duration_ns)

    def _kill(self, server: Server, duration_ns: int) -> None:
        generation = int(server.instance.rpartition(".")[2]) + 1
        server.kill()
        del self._at_site[server.site.name]
        self._network.died(server.link)
        self._agenda.at(self.now_ns + self.latency_ns(), lambda: self.router.broken(server))
        self._agenda.at(self.now_ns + duration_ns, lambda: self._start(server.site, generation))

    def _hang(self, server: Server, duration_ns: int) -> None:
        process = server.process
        if process.stopped:
            return
        process.stop()
        self._network.stopped(server.link)

        def resume() -> None:
            if not process.dead:
                self.tell(server.instance, "goes on")
                process.resume()

        self._agenda.at(self.now_ns + duration_ns, resume)
