"""What becomes of an instance that is out of reach, by time and answers alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
from link_pair import card

from moonlang.base.clock import NS_PER_MS, NS_PER_S
from moonlang.core.pairing import Lost
from moonlang.disaggregation import peers
from moonlang.disaggregation.frames import Hello
from moonlang.disaggregation.peers import Answer, Peers, Reach

ADDRESS = ("10.0.0.1", 4000)


class Line:
    """As much of a Connection as Peers sees."""

    def __init__(self, instance: str = "p", backend: str = "mooncake") -> None:
        self.hello = Hello(1, "prefill", card(instance, backend=backend), 1, ADDRESS, "off", b"")
        self.instance = instance
        self.heard_ns = 0


class Bench:
    def __init__(self) -> None:
        self.lost: list[Lost] = []
        self.reach = Reach()
        self.peers = Peers(self.reach, self.lost.append, host="")

    def join(self, line: Line) -> None:
        self.peers.joined(cast(Any, line), ADDRESS)

    def broke(self, line: Line, now_ns: int) -> None:
        self.peers.broke(cast(Any, line), now_ns)

    def fates(self) -> list[str]:
        return [event.fate for event in self.lost]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_silent_and_back(bench: Bench) -> None:
    line = Line()
    bench.join(line)
    bench.peers.listen(700 * NS_PER_MS)
    assert bench.reach("p")
    assert bench.fates() == []
    for at in (900, 1500, 60_000):  # said once, and never gone: its connection stands
        bench.peers.listen(at * NS_PER_MS)
    assert bench.fates() == ["silent"]
    assert not bench.reach("p")
    bench.peers.heard(cast(Any, line))
    assert bench.reach("p")


def test_after_a_stall_of_our_own_nobody_is_blamed_or_trusted(bench: Bench) -> None:
    line = Line()
    bench.join(line)
    bench.peers.stalled(9 * NS_PER_S)
    bench.peers.listen(9 * NS_PER_S)
    assert bench.fates() == []
    assert not bench.reach("p"), "much may have happened meanwhile"
    bench.peers.listen(10 * NS_PER_S)
    assert bench.fates() == ["silent"], "now it had its chance"


@pytest.mark.parametrize("answer", [Answer("", "refused", refused=True, reached=False), Answer("q")])
def test_nobody_there_or_another_one(bench: Bench, answer: Answer) -> None:
    bench.join(line := Line())
    bench.broke(line, 0)
    assert [peer.card.instance for peer in bench.peers.to_ask(0)] == ["p"]
    assert bench.peers.to_ask(1) == []
    assert bench.peers.answered("p", answer, 1) is None
    bench.peers.listen(1)
    assert bench.fates() == ["silent"], "bytes may be on their way still"
    bench.peers.listen(1 + peers.GRACE_NS)
    assert bench.fates() == ["silent", "gone"]
    assert not bench.peers.known


def test_no_grace_where_writes_end_with_the_process(bench: Bench) -> None:
    bench.join(line := Line(backend="local"))
    bench.broke(line, 0)
    bench.peers.answered("p", Answer("", "refused", refused=True, reached=False), 1)
    bench.peers.listen(1)
    assert bench.fates() == ["silent", "gone"]


def test_a_stopped_process_whose_kernel_answers_is_never_gone(bench: Bench) -> None:
    bench.join(line := Line())
    bench.broke(line, 0)
    for second in range(100):
        now_ns = second * NS_PER_S
        bench.peers.to_ask(now_ns)
        assert bench.peers.answered("p", Answer("", "no answer", reached=True), now_ns) is None
        bench.peers.listen(now_ns)
    assert bench.fates() == ["silent"]
    found = bench.peers.answered("p", Answer("p"), 100 * NS_PER_S)
    assert found is not None, "it is to be connected again"


def test_a_host_that_is_out_of_reach_for_long_is_gone(bench: Bench) -> None:
    bench.join(line := Line())
    bench.broke(line, 0)
    for second in range(1, 32):
        bench.peers.answered("p", Answer("", "no route", reached=False), second * NS_PER_S)
        bench.peers.listen(second * NS_PER_S)
    assert bench.fates() == ["silent", "gone"]


def test_the_same_instance_again(bench: Bench) -> None:
    first, second = Line(), Line()
    bench.join(first)
    bench.join(second)
    bench.broke(first, 0)
    assert bench.fates() == [], "it was replaced before it broke"
    assert bench.reach("p")
