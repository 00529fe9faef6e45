"""The event loop in virtual time: clients, the real Scheduler, and an executor that takes simulated nanoseconds.

One step does what the scheduler's role does: take the messages that have come, commit the plans that have run, plan
until nothing more fits in flight. Everything that happens follows from the `Case`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence

import msgspec

from moonlang.base.clock import NS_PER_MS
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.request import Finish
from moonlang.core.sampling import GrammarSpec
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import inside
from moonlang.sim.agenda import Agenda
from moonlang.sim.chain import ChainModel
from moonlang.sim.client import Client
from moonlang.sim.executor import ChainExecutor, PagedCells, Pipeline
from moonlang.sim.stage import Checker
from moonlang.sim.violation import Violation
from moonlang.sim.workload import Case, Script, compile_error, compile_ns

_HOUR_NS = 3_600_000 * NS_PER_MS
_LATE_WAKE = 0.1  # share of steps that begin late, so that several things have happened by then


class World:
    """One case, run once. `make_scheduler` exists for mutants, `make_cells` and the hooks for worlds that hold more."""

    def __init__(
        self,
        case: Case,
        checkers: Sequence[Checker[World]],
        make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler,
        trace: Callable[[str], None] | None = None,
        make_cells: Callable[[int, int], PagedCells] = PagedCells,
    ) -> None:
        config = case.config
        poison = {s.sampling.seed: s.poison_at for s in case.scripts if s.poison_at is not None}
        cells = make_cells(config.num_pages, config.page_size)
        self.case = case
        self.scheduler = make_scheduler(config)
        self.pipeline = Pipeline(
            ChainExecutor(case.model, cells, config.max_running, poison), case.plan_ns, case.token_ns
        )
        self.clients: dict[str, Client] = {}
        self._live: dict[str, Client] = {}
        self.steps = 0
        self._checkers = checkers
        self._trace = trace
        self._rng = random.Random(case.seed)
        self._agenda = Agenda()
        self._at = self._agenda.at
        self._digest = hashlib.blake2b(digest_size=16)
        self._followers: dict[int, list[Script]] = {}
        for script in case.scripts:
            if script.parent is None:
                self._at(script.at_ns, lambda s=script: self._send(s, s.prompt))
            else:
                self._followers.setdefault(script.parent, []).append(script)
        for time_ns in case.flush_at_ns:
            self._at(time_ns, self._flush)
        for time_ns in case.abort_all_at_ns:
            self._at(time_ns, self._abort_all)

    @property
    def now_ns(self) -> int:
        return self._agenda.now_ns

    @property
    def config(self) -> SchedulerConfig:
        return self.case.config

    @property
    def model(self) -> ChainModel:
        return self.case.model

    @property
    def page_size(self) -> int:
        return self.config.page_size

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have: the context, or all pages but the one that is never used."""
        return min(self.config.context_length, (self.config.num_pages - 1) * self.config.page_size)

    def excuse(self, client: Client, finish: Finish) -> bool:
        """Whether there has been cause for this end of a request."""
        full = finish.status == 503 and self.config.max_queued is not None
        return full or client.excuses(finish, now_ns=self.now_ns, longest=self.longest)

    @property
    def digest(self) -> str:
        """A hash over every plan and every delta so far."""
        return self._digest.hexdigest()

    @property
    def unfinished(self) -> Iterable[Client]:
        """Clients that wait for more."""
        return self._live.values()

    def run(self) -> None:
        """Until nothing is left to happen; Violation at the first thing that is wrong."""
        while (next_ns := self.next_ns()) is not None:
            self.go_on(next_ns)
        self.end()

    def go_on(self, next_ns: int) -> None:
        """One step, at this time or a little later."""
        late_ns = self._rng.randrange(3 * self.case.plan_ns) if self._rng.random() < _LATE_WAKE else 0
        self._agenda.now_ns = max(self.now_ns, next_ns) + late_ns
        self._step()

    def end(self) -> None:
        """Nothing is left to happen."""
        for checker in self._checkers:
            checker.at_end(self)

    # ---- hooks

    def arrive(self) -> None:
        """What comes from elsewhere, before anything is planned."""

    def depart(self) -> None:
        """What goes elsewhere, when everything is planned."""

    @property
    def elsewhere_ns(self) -> int | None:
        """When something comes from there."""
        return None

    # ---- one step

    def _step(self) -> None:
        self.steps += 1
        if self.now_ns > _HOUR_NS:
            raise Violation("liveness", "the run does not end within a virtual hour")
        self._agenda.run_due()
        while self.pipeline.next_ns is not None and self.pipeline.next_ns <= self.now_ns:
            result = self.pipeline.finish()
            self._say("done  ", result)
            self._take(self.scheduler.commit(result, self.now_ns))
        for spec in self.scheduler.grammars_wanted():
            self._at(self.now_ns + compile_ns(spec), lambda s=spec: self._compiled(s))
        self._take(self.scheduler.expire(self.now_ns))
        self.arrive()
        while (plan := self.scheduler.plan(self.now_ns)) is not None:
            self._say("plan  ", plan)
            self._digest.update(msgspec.msgpack.encode(plan))
            self.pipeline.submit(plan, self.now_ns)
            for checker in self._checkers:
                checker.on_plan(self, plan)
        self.depart()
        for checker in self._checkers:
            checker.after_step(self)

    def next_ns(self) -> int | None:
        """When the next thing happens; None when nothing is left."""
        times = (self._agenda.next_ns, self.pipeline.next_ns, self.scheduler.next_wake_ns(), self.elsewhere_ns)
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    # ---- what comes from outside

    def _send(self, script: Script, prompt: tuple[int, ...]) -> None:
        self._say("send  ", script.rid, prompt)
        self.clients[script.rid] = self._live[script.rid] = Client(script, prompt, self.now_ns)
        if script.abort_after_ns is not None:
            self._at(self.now_ns + script.abort_after_ns, lambda: self._hang_up(script))
        message = Generate(
            rid=script.rid,
            input_ids=list(prompt),
            sampling=script.sampling,
            stream=script.stream,
            logprob=script.logprob,
            priority=script.priority,
            extra_key=script.extra_key,
            timeout_ms=script.timeout_ms,
        )
        self._take(self.scheduler.add(message, self.now_ns))

    def _hang_up(self, script: Script) -> None:
        """The client is gone, at any time, also after the end of its request; or the clients of all its samples are."""
        name = script.rid.split("-")[0] + "-" if script.abort_group else script.rid
        self._say("abort ", name)
        self._note_hang_up([c for c in self.clients.values() if c.script.rid.startswith(name)])
        self._take(self.scheduler.abort(name, exact=not script.abort_group))

    def _abort_all(self) -> None:
        self._say("abort all")
        self._note_hang_up(self.clients.values())
        self._take(self.scheduler.abort("", every=True))

    def _note_hang_up(self, clients: Iterable[Client]) -> None:
        for client in clients:
            client.hung_up_ns = self.now_ns if client.hung_up_ns is None else client.hung_up_ns

    def _stop(self, client: Client) -> None:
        """The detokenizer has seen a stop string and answered the client."""
        if not client.is_done:
            self._say("stop  ", client.script.rid)
            client.stopped = True
            self.scheduler.stop(client.script.rid)
            self._finished(client)

    def _flush(self) -> None:
        idle = self.scheduler.idle and not inside.is_moving(self.scheduler)
        done = self.scheduler.flush_cache()
        self._say("flush ", done)
        stats = self.scheduler.stats()
        if done != idle or (done and stats.free_tokens != stats.max_total_tokens):
            raise Violation("flush", f"idle {idle}, flushed {done}, {stats.free_tokens} tokens free")

    def _compiled(self, spec: GrammarSpec) -> None:
        self._take(self.scheduler.grammar_ready(spec, compile_error(spec), self.now_ns))

    # ---- what goes out

    def _take(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            self._say("delta ", delta)
            self._digest.update(msgspec.msgpack.encode(delta))
            for checker in self._checkers:
                checker.on_delta(self, delta)
            self._deliver(self.clients[delta.rid], delta)

    def _deliver(self, client: Client, delta: TokenDelta) -> None:
        client.take(delta)
        if delta.finish is not None:
            self._finished(client)
        elif _reached(client, client.script.abort_at_tokens):
            self._at(self.now_ns, lambda: self._hang_up(client.script))
        elif _reached(client, client.script.stop_at_tokens):
            self._at(self.now_ns, lambda: self._stop(client))

    def _finished(self, client: Client) -> None:
        del self._live[client.script.rid]
        for script in self._followers.get(client.script.index, ()):
            prompt = client.prompt + tuple(client.tokens) + script.prompt
            self._at(self.now_ns + script.at_ns, lambda s=script, p=prompt: self._send(s, p))

    def _say(self, what: str, *values: object) -> None:
        if self._trace is not None:
            self._trace(f"{self.now_ns / NS_PER_MS:12.3f} ms  {what} {' '.join(map(str, values))}")


def _reached(client: Client, limit: int | None) -> bool:
    return limit is not None and len(client.tokens) >= limit
