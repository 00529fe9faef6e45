"""The lanes of a transfer: order within one peer, independence between peers, ends of every kind."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator, Sequence

import pytest
from link_pair import card

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import Push, Span
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.disaggregation.channel import Contact, TransferChannel, TransferOptions, Work

PATIENCE_S = 60.0


class Gated:
    """A mover whose pushes wait for the gate of their peer, and end as their first source page says."""

    name = "gated"

    def __init__(self) -> None:
        self.gates = {name: threading.Semaphore(0) for name in ("a", "b")}
        self.begun = threading.Semaphore(0)
        self.order: list[int] = []

    def register(self, regions: Sequence[KvRegion], instance: str) -> Sequence[Contact]:
        return [Contact() for _ in regions]

    def push(self, push: Push, work: Work) -> int:
        self.begun.release()
        assert self.gates[push.peer.instance].acquire(timeout=PATIENCE_S)
        work.go_on()
        self.order.append(push.room)
        if push.source[0] == 1:
            raise PeerError("The peer does not take it.")
        if push.source[0] == 2:
            raise ValueError("a bug")
        return 77

    def forget(self, instance: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


class Bench:
    def __init__(self) -> None:
        self.mover = Gated()
        self.linked = {"a", "b"}
        self.channel = TransferChannel(self.mover, TransferOptions(host="", linked=lambda name: name in self.linked))
        self.channel.register(card("here").regions, "here")

    def push(self, room: int, peer: str = "a", page: int = 0, patience_s: float = PATIENCE_S) -> int:
        op = Push(
            room=room,
            peer=card(peer),
            source=(page,),
            target=(0,),
            spans=(Span(0, 0, 8),),
            deadline_ns=monotonic_ns() + int(patience_s * NS_PER_S),
        )
        return self.channel.submit(op).id

    def begin(self, room: int, **kwargs: object) -> int:
        """Submit, and wait until it is under way."""
        number = self.push(room, **kwargs)  # type: ignore[arg-type]
        assert self.mover.begun.acquire(timeout=PATIENCE_S)
        return number

    def ends(self, count: int) -> list[Completion]:
        found: list[Completion] = []
        while len(found) < count:
            assert select.select([self.channel.fileno()], [], [], PATIENCE_S)[0]
            found += self.channel.poll()
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for gate in made.mover.gates.values():
        gate.release(8)
    made.channel.close()


def test_in_order_to_one_peer_and_past_one_that_hangs(bench: Bench) -> None:
    bench.begin(1, peer="a")
    for room in (2, 3, 4):
        bench.push(room, peer="b")
    bench.mover.gates["b"].release(3)
    assert [one.outcome for one in bench.ends(3)] == [Outcome.OK] * 3
    assert bench.mover.order == [2, 3, 4]
    bench.mover.gates["a"].release()
    (last,) = bench.ends(1)
    assert (last.ticket.id, last.count, last.bytes, last.value) == (0, 1, 8, 77)


def test_what_has_not_begun_is_cancelled_at_once_and_the_rest_when_it_can_stop(bench: Bench) -> None:
    first, second = bench.begin(1), bench.push(2)
    for number in (first, second):
        bench.channel.cancel(Ticket(number, "gated"))
    (one,) = bench.ends(1)
    assert (one.ticket.id, one.outcome) == (second, Outcome.CANCELLED)
    bench.mover.gates["a"].release()
    (other,) = bench.ends(1)
    assert (other.ticket.id, other.outcome) == (first, Outcome.CANCELLED)
    assert bench.mover.order == []


def test_failures_say_why(bench: Bench) -> None:
    bench.push(1, page=1)
    bench.push(2, patience_s=0)
    bench.mover.gates["a"].release(2)
    assert [(one.outcome, one.error) for one in bench.ends(2)] == [
        (Outcome.FAILED, "The peer does not take it."),
        (Outcome.FAILED, "The transfer did not end within its time limit."),
    ]
    bench.linked.clear()
    bench.push(3)
    assert "out of reach" in bench.ends(1)[0].error


def test_a_bug_in_a_backend_comes_out_of_poll(bench: Bench) -> None:
    bench.push(1, page=2)
    bench.mover.gates["a"].release()
    with pytest.raises(ValueError, match="a bug"):
        bench.ends(1)
