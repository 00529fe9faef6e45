"""One server: the real Scheduler between a simulated executor, link and transfer engine.

Its step is that of the scheduler's role, and what its API server does with an answer (stop strings) is here too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.pairing import KvCard, PairEvent, PairMessage
from moonlang.core.plan import StepPlan
from moonlang.core.sampling import GrammarSpec
from moonlang.core.ticket import Ticket
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import inside
from moonlang.sim.agenda import Agenda
from moonlang.sim.executor import ChainExecutor
from moonlang.sim.pd.cells import SharedCells
from moonlang.sim.pd.muscle import Muscle
from moonlang.sim.pd.network import Network, SimLink
from moonlang.sim.pd.process import Process
from moonlang.sim.pd.transfer import SimTransfer, Target
from moonlang.sim.pd.workload import PdCase, Site
from moonlang.sim.stage import Checker, Stage
from moonlang.sim.violation import Violation
from moonlang.sim.workload import compile_error, compile_ns

_LATE_STEP = 0.1  # share of steps that begin late, so that several things have happened by then


class Host(Protocol):
    """What a server needs of the world around it, and tells it."""

    def find(self, card: KvCard) -> Target | None:
        """The pool of the instance that a card is of."""
        ...

    def written(self, server: Server, card: KvCard, room: int, page: int) -> None: ...
    def said(self, server: Server, instance: str, body: PairMessage) -> None: ...
    def heard(self, server: Server, event: PairEvent) -> None: ...
    def planned(self, server: Server, plan: StepPlan) -> None: ...
    def stepped(self, server: Server) -> None: ...
    def answered(self, server: Server, delta: TokenDelta) -> None: ...
    def stopped(self, server: Server, rid: str) -> None:
        """The answer has ended with a stop string."""
        ...

    def tell(self, *what: object) -> None: ...


class Server:
    """`generation`: how many servers have been at this site before. stop_at: by rid, after how many tokens the
    detokenizer finds a stop string."""

    def __init__(
        self,
        host: Host,
        case: PdCase,
        site: Site,
        generation: int,
        agenda: Agenda,
        network: Network,
        make_scheduler: Callable[[SchedulerConfig], Scheduler],
        checkers: Sequence[Checker[Stage]],
    ) -> None:
        config = site.settings(generation)
        assert config.pairing is not None
        card = config.pairing.card
        self.site = site
        self.config = config
        self.instance = card.instance
        self.process = Process(agenda)
        self.scheduler = make_scheduler(config)
        self.cells = SharedCells(card.regions)
        self.link = SimLink(network, self.process, card, self.wake)
        self.steps = 0
        self.checkers = checkers
        self.stop_at: dict[str, int] = {}
        self._rng = random.Random(f"{case.seed} {self.instance}")
        self._host = host
        self._late_ns = case.plan_ns
        self._results_first = self._rng.random() < 0.5  # the order in which a step takes things must not matter
        self.transfer = SimTransfer(
            self.process,
            self.link,
            self.cells,
            case.transfer,
            self._rng,
            most_bytes=config.pairing.push_most_bytes,
            find=host.find,
            written=lambda card, room, page: host.written(self, card, room, page),
            wake=self.wake,
        )
        poison = {s.sampling.seed: s.poison_at for s in case.scripts if s.poison_at is not None}
        self.pipeline = Muscle(
            ChainExecutor(case.model, self.cells, config.max_running, poison, aligned=site.role == "prefill"),
            self.cells,
            self.process,
            self.wake,
            num_layers=case.schema.num_layers,
            plan_ns=case.plan_ns,
            token_ns=case.token_ns,
        )
        self._progress = self.pipeline.progress
        self._calls: list[Callable[[int], Sequence[TokenDelta]]] = []
        self._tickets: dict[int, Ticket] = {}  # of transfers under way, by the scheduler's numbers for them
        self._awake = False
        self._timer_ns: int | None = None
        self._counts: dict[str, int] = {}  # tokens so far, of answers that will have a stop string
        self._stopped: dict[str, None] = {}

    @property
    def now_ns(self) -> int:
        return self.process.now_ns

    def rid_of(self, epoch: int) -> str:
        """The request that was admitted under this number and runs."""
        return next(request.rid for request in inside.running(self.scheduler) if request.epoch == epoch)

    # ---- what comes from outside

    def add(self, message: Generate) -> None:
        self._call(lambda now_ns: self.scheduler.add(message, now_ns))

    def abort(self, rid: str) -> None:
        """The HTTP connection of this request is gone."""
        self._call(lambda now_ns: self.scheduler.abort(rid, exact=True))

    def kill(self) -> None:
        self.transfer.die()
        self.process.kill()

    def wake(self) -> None:
        """There is something to do."""
        if not self._awake:
            self._awake = True
            late_ns = self._rng.randrange(3 * self._late_ns) if self._rng.random() < _LATE_STEP else 0
            self.process.after(late_ns, self._step)

    def _call(self, action: Callable[[int], Sequence[TokenDelta]]) -> None:
        self._calls.append(action)
        self.wake()

    # ---- one step

    def _step(self) -> None:
        self._awake = False
        self.steps += 1
        now_ns, scheduler = self.process.now_ns, self.scheduler
        calls, self._calls = self._calls, []
        for call in calls:
            self._answer(call(now_ns))
        for take in (self._commit, self._hear) if self._results_first else (self._hear, self._commit):
            take(now_ns)
        for spec in scheduler.grammars_wanted():
            self.process.after(compile_ns(spec), lambda s=spec: self._compiled(s))
        self._answer(scheduler.expire(now_ns))
        while (plan := scheduler.plan(now_ns)) is not None:
            self._host.planned(self, plan)
            self.pipeline.submit(plan)
            for checker in self.checkers:
                checker.on_plan(self, plan)
        self._send_out()
        for checker in self.checkers:
            checker.after_step(self)
        self._host.stepped(self)
        self._set_timer()

    def _commit(self, now_ns: int) -> None:
        """Plans that have run."""
        for result in self.pipeline.poll():
            self._host.tell(self.instance, "done", result)
            self._answer(self.scheduler.commit(result, now_ns))

    def _hear(self, now_ns: int) -> None:
        """How far the running plan is, what peers have said, and transfers that have ended."""
        peers = self.scheduler.peers
        if self.pipeline.progress != self._progress:
            self._progress = self.pipeline.progress
            peers.progress(*self._progress)
        for event in self.link.recv():
            self._host.heard(self, event)
            self._answer(peers.heard(event, now_ns))
        for completion in self.transfer.poll():
            self._host.tell(self.instance, "transfer", completion)
            number = next(number for number, ticket in self._tickets.items() if ticket == completion.ticket)
            del self._tickets[number]
            self._answer(peers.transferred(number, completion, now_ns))

    def _send_out(self) -> None:
        """What the scheduler wants of link and transfer engine."""
        mail = self.scheduler.peers.mail
        for spec, deadline_ns in mail.opens():
            self.link.open(spec, deadline_ns)
        for instance, body in mail.outgoing():
            self._host.said(self, instance, body)
            self.link.send(instance, body)
        for number, op in mail.transfers():
            self._host.tell(self.instance, "transfer", number, op)
            self._tickets[number] = self.transfer.submit(op)
        for number in mail.cancels():
            if number in self._tickets:  # else it has just completed
                self.transfer.cancel(self._tickets[number])

    def _set_timer(self) -> None:
        wake_ns = self.scheduler.next_wake_ns()
        if wake_ns is None or (self._timer_ns is not None and self._timer_ns <= wake_ns):
            return
        now_ns = self.process.now_ns
        if wake_ns <= now_ns and not self._awake:
            raise Violation("liveness", f"{self.instance} wants to be woken at {wake_ns}, which is past, for nothing")
        self._timer_ns = wake_ns
        self.process.after(wake_ns - now_ns, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_ns = None
        self.wake()

    def _compiled(self, spec: GrammarSpec) -> None:
        self._call(lambda now_ns: self.scheduler.grammar_ready(spec, compile_error(spec), now_ns))

    # ---- what goes out

    def _answer(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            if delta.rid not in self._stopped:
                self._host.answered(self, delta)
                self._detokenize(delta)

    def _detokenize(self, delta: TokenDelta) -> None:
        """With a stop string in its text an answer ends here, and the scheduler is told."""
        rid = delta.rid
        most = self.stop_at.get(rid)
        if most is None or delta.finish is not None:
            return
        self._counts[rid] = self._counts.get(rid, 0) + len(delta.tokens)
        if self._counts[rid] >= most:
            self._stopped[rid] = None
            self._host.stopped(self, rid)
            self._call(lambda now_ns: self._stop(rid))

    def _stop(self, rid: str) -> Sequence[TokenDelta]:
        self.scheduler.stop(rid)
        return ()
