"""The simulated transfer engine keeps to `KvTransfer`: in order, completed once, nothing under way afterwards."""

from __future__ import annotations

import random

import pytest

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard, PeerSpec, Push, Span, Verify
from moonlang.core.ticket import Completion, Outcome
from moonlang.sim.agenda import Agenda
from moonlang.sim.pd.cells import SharedCells
from moonlang.sim.pd.network import NetSpec, Network, SimLink
from moonlang.sim.pd.process import Process
from moonlang.sim.pd.transfer import SimTransfer, Target, TransferSpec
from moonlang.sim.violation import Violation

SCHEMA = KvSchema(num_layers=2, num_kv_heads=1, head_dim=1, page_size=2, dtype="int8", itemsize=1)
REGION = KvRegion(address=0, stride=SCHEMA.page_bytes, num_pages=8, schema=SCHEMA)
WHOLE = (Span(0, 0, SCHEMA.page_bytes),)
SLICE_NS = NS_PER_MS


class Bench:
    """p0, whose pages 1 .. 4 are filled, writes to d0."""

    def __init__(self, **spec: float | bool | int) -> None:
        self.agenda = Agenda()
        network = Network(self.agenda, random.Random(1), NetSpec(latency_ns=(1000, 1000)))
        self.p0, self.d0 = self.link(network, "p0"), self.link(network, "d0")
        network.sites["p0", 1] = self.p0
        self.d0.open(PeerSpec("p0", 1, 7), NS_PER_S)
        self.source, self.target = SharedCells((REGION,)), SharedCells((REGION,))
        for page in range(1, 5):
            self.source.write(page, 0, page)
            self.source.write(page, 1, 1)
        self.written: list[int] = []
        self.push = SimTransfer(
            self.p0.process,
            self.p0,
            self.source,
            TransferSpec(slice_ns=SLICE_NS, slice_pages=1, **spec),  # type: ignore[arg-type]
            random.Random(2),
            most_bytes=4 * SCHEMA.page_bytes,
            find=self.find,
            written=lambda card, room, page: self.written.append(page),
            wake=lambda: None,
        )
        self.run(NS_PER_MS)

    def link(self, network: Network, name: str) -> SimLink:
        card = KvCard(instance=name, backend="sim", host=name, regions=(REGION,), sessions=("",), handles=("",))
        return SimLink(network, Process(self.agenda), card, lambda: None)

    def find(self, card: KvCard) -> Target | None:
        return None if self.d0.process.dead else Target(self.target, self.d0.process)

    def op(self, source: tuple[int, ...], target: tuple[int, ...], deadline_ns: int = NS_PER_S) -> Push:
        return Push(room=7, peer=self.d0.card, source=source, target=target, spans=WHOLE, deadline_ns=deadline_ns)

    def run(self, duration_ns: int) -> None:
        until_ns = self.agenda.now_ns + duration_ns
        while self.agenda.next_ns is not None and self.agenda.next_ns <= until_ns:
            self.agenda.run_one()
        self.agenda.now_ns = until_ns

    def only(self) -> Completion:
        (completion,) = self.push.poll()
        return completion


def test_pages_arrive_in_order_and_verify_with_the_checksum_of_the_push() -> None:
    bench = Bench()
    bench.push.submit(bench.op((1, 2), (5, 6)))
    bench.push.submit(bench.op((3,), (7,)))
    bench.run(10 * SLICE_NS)
    first, second = bench.push.poll()
    assert (first.outcome, second.outcome, bench.written) == (Outcome.OK, Outcome.OK, [5, 6, 7])
    assert first.bytes == 2 * SCHEMA.page_bytes
    assert bench.target.read([5, 6, 7], 6) == bench.source.read([1, 2, 3], 6)
    check = SimTransfer(
        bench.d0.process,
        bench.d0,
        bench.target,
        TransferSpec(slice_ns=SLICE_NS, slice_pages=1),
        random.Random(3),
        most_bytes=0,
        find=bench.find,
        written=lambda *_: None,
        wake=lambda: None,
    )
    check.submit(Verify(room=7, pages=(5, 6), spans=WHOLE))
    bench.run(2 * SLICE_NS)
    assert [completion.value for completion in check.poll()] == [first.value]


def test_what_travels_is_what_was_there_when_its_slice_was_read() -> None:
    bench = Bench()
    bench.push.submit(bench.op((1, 2), (5, 6)))
    bench.run(SLICE_NS // 2)
    bench.source.write(1, 0, 99)
    bench.source.write(2, 0, 99)
    bench.run(10 * SLICE_NS)
    assert (bench.target.snapshot(5, 0), bench.target.snapshot(6, 0)) == ((1, 2), (99,))


def test_a_cancelled_push_completes_and_then_nothing_is_written_any_more() -> None:
    bench = Bench()
    ticket = bench.push.submit(bench.op((1, 2, 3), (5, 6, 7)))
    bench.run(SLICE_NS + SLICE_NS // 2)
    bench.push.cancel(ticket)
    bench.run(SLICE_NS)
    assert bench.only().outcome is Outcome.CANCELLED
    bench.run(10 * SLICE_NS)
    assert bench.written == [5, 6]


def test_a_stopped_process_finishes_its_slice_when_it_goes_on_and_then_looks() -> None:
    bench = Bench()
    bench.push.submit(bench.op((1, 2, 3), (5, 6, 7)))
    bench.run(SLICE_NS // 2)
    bench.p0.process.stop()
    bench.run(10 * SLICE_NS)
    assert bench.written == []
    bench.p0.connections["d0"].drop()
    bench.p0.process.resume()
    bench.run(SLICE_NS)
    assert (bench.written, bench.only().outcome) == ([5], Outcome.FAILED)


@pytest.mark.parametrize("one_sided", [True, False])
def test_a_stopped_target_takes_one_sided_writes_only(one_sided: bool) -> None:
    bench = Bench(one_sided=one_sided)
    bench.push.submit(bench.op((1,), (5,), deadline_ns=50 * SLICE_NS))
    bench.d0.process.stop()
    bench.run(100 * SLICE_NS)
    assert bench.only().outcome is (Outcome.OK if one_sided else Outcome.FAILED)
    bench.d0.process.resume()
    bench.run(SLICE_NS)
    assert bench.written == ([5] if one_sided else [])


def test_a_dead_target_and_a_late_push_fail() -> None:
    bench = Bench()
    bench.push.submit(bench.op((1,), (5,), deadline_ns=0))
    bench.run(SLICE_NS)
    assert "deadline" in bench.only().error
    bench.push.submit(bench.op((1,), (5,)))
    bench.d0.process.kill()
    bench.run(2 * SLICE_NS)
    assert (bench.only().outcome, bench.written) == (Outcome.FAILED, [])


def test_a_damaged_page_has_the_checksum_of_the_right_one() -> None:
    bench, right = Bench(corrupt=1.0), Bench()
    for each in (bench, right):
        each.push.submit(each.op((1,), (5,)))
        each.run(3 * SLICE_NS)
    assert bench.only().value == right.only().value
    assert bench.target.read([5], 2) != right.target.read([5], 2)


def test_a_push_beyond_the_bound_is_refused() -> None:
    bench = Bench()
    with pytest.raises(Violation, match="bounds"):
        bench.push.submit(bench.op((1, 2, 3, 4, 1), (3, 4, 5, 6, 7)))
