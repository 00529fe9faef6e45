"""The simulated connections keep to `PeerLink`, and break it where a case says so."""

from __future__ import annotations

import random

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.core.pairing import Heard, KvCard, Linked, Lost, Noted, PairEvent, PeerSpec, Unreachable
from moonlang.sim.agenda import Agenda
from moonlang.sim.pd.network import NetSpec, Network, SimLink
from moonlang.sim.pd.process import Process

HERE = PeerSpec("p0", 1, 7)


class Bench:
    """Two processes, p0 that can be found, and d0 that looks for it."""

    def __init__(self, **spec: float | bool) -> None:
        self.agenda = Agenda()
        net = NetSpec(latency_ns=(10_000, 900_000), **spec)  # type: ignore[arg-type]
        self.network = Network(self.agenda, random.Random(1), net)
        self.p0, self.d0 = self.link("p0"), self.link("d0")
        self.network.sites["p0", 1] = self.p0

    def link(self, name: str) -> SimLink:
        card = KvCard(instance=name, backend="sim", host=name, regions=(), sessions=(), handles=())
        return SimLink(self.network, Process(self.agenda), card, lambda: None)

    def run(self, duration_ns: int) -> None:
        until_ns = self.agenda.now_ns + duration_ns
        while self.agenda.next_ns is not None and self.agenda.next_ns <= until_ns:
            self.agenda.run_one()
        self.agenda.now_ns = until_ns

    def connected(self) -> Bench:
        self.d0.open(HERE, NS_PER_S)
        self.run(10 * NS_PER_MS)
        assert self.d0.recv() == [Linked(7, self.p0.card)]
        return self


def numbers(events: list[PairEvent]) -> list[int]:
    return [event.body.room for event in events if isinstance(event, Heard)]


def test_messages_come_in_order_and_once() -> None:
    bench = Bench().connected()
    for number in range(50):
        bench.d0.send("p0", Noted(number))
        bench.run(100_000)
    bench.run(NS_PER_S)
    assert numbers(bench.p0.recv()) == list(range(50))


def test_messages_are_lost_and_repeated_where_the_case_says_so() -> None:
    bench = Bench(lost=0.3, repeated=0.3, late_copies=True).connected()
    for number in range(200):
        bench.d0.send("p0", Noted(number))
    bench.run(NS_PER_S)
    got = numbers(bench.p0.recv())
    assert set(got) < set(range(200))
    assert len(got) > len(set(got))
    assert got != sorted(got)


def test_nobody_there_is_unreachable() -> None:
    bench = Bench()
    bench.d0.open(PeerSpec("p9", 1, 3), NS_PER_S)
    bench.p0.process.stop()
    bench.d0.open(HERE, 5 * NS_PER_S)
    bench.run(2 * NS_PER_S)
    assert [type(event) for event in bench.d0.recv()] == [Unreachable, Unreachable]


def test_a_stopped_process_is_silent_and_then_back() -> None:
    bench = Bench().connected()
    bench.p0.process.stop()
    bench.network.stopped(bench.p0)
    bench.run(NS_PER_S)
    assert bench.d0.recv() == [Lost("p0", "silent")]
    bench.d0.send("p0", Noted(1))
    bench.p0.process.resume()
    bench.run(NS_PER_S)
    assert bench.p0.recv() == [Lost("d0", "silent")]
    bench.p0.send("d0", Noted(2))
    bench.run(10 * NS_PER_MS)
    assert numbers(bench.d0.recv()) == [2]


def test_a_dead_process_is_gone_for_good() -> None:
    for quick, fates in ((1.0, ["gone"]), (0.0, ["silent", "gone"])):
        bench = Bench(quick_death=quick).connected()
        bench.p0.send("d0", Noted(1))
        bench.p0.process.kill()
        bench.network.died(bench.p0)
        bench.run(5 * NS_PER_S)
        events = bench.d0.recv()
        assert [event.fate for event in events if isinstance(event, Lost)] == fates
        assert isinstance(events[-1], Lost)
        assert not bench.d0.is_up("p0")


def test_a_reset_loses_what_is_on_its_way_and_the_connection_comes_back() -> None:
    bench = Bench().connected()
    bench.d0.send("p0", Noted(1))
    bench.network.reset(bench.d0.connections["p0"])
    bench.run(NS_PER_S)
    assert bench.p0.recv() == [Lost("d0", "silent")]
    bench.d0.send("p0", Noted(2))
    bench.run(NS_PER_S)
    assert numbers(bench.p0.recv()) == [2]


def test_a_clogged_connection_is_late_or_silent() -> None:
    bench = Bench().connected()
    bench.network.clog(bench.d0.connections["p0"], 500 * NS_PER_MS)
    bench.d0.send("p0", Noted(1))
    bench.run(400 * NS_PER_MS)
    assert bench.p0.recv() == []
    bench.run(NS_PER_S)
    assert numbers(bench.p0.recv()) == [1]
    bench.network.clog(bench.d0.connections["p0"], 3 * NS_PER_S)
    bench.run(NS_PER_S)
    assert bench.p0.recv() == [Lost("d0", "silent")]
    assert bench.d0.recv() == [Lost("p0", "silent")]
    bench.run(3 * NS_PER_S)
    assert bench.d0.is_up("p0")
