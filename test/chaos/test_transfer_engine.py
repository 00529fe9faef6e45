"""Mooncake's real engine against processes that are killed and stopped."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator

import pytest
from kv_peer import SCHEMA, KvPeer, Side, opener, push

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.core.ticket import Outcome
from moonlang.mooncake import lib

pytestmark = pytest.mark.skipif(bool(lib.how_to_get()), reason=f"Mooncake is not there: {lib.how_to_get()}")

PAGES = 64 << 10  # of 1 KB: enough to be in the middle of them
SOON_NS = 25 * NS_PER_S  # left alone, the library hangs for a minute, and gives up after half of one
NewPeer = Callable[[], KvPeer]


@pytest.fixture(scope="module")
def prefill() -> Iterator[Side]:
    side = Side(opener("mooncake_tcp"), "prefill", PAGES)
    side.pool.fill(os.urandom(PAGES * SCHEMA.page_bytes))
    yield side
    side.transfer.close()


@pytest.fixture
def new_peer() -> Iterator[NewPeer]:
    started: list[KvPeer] = []

    def new() -> KvPeer:
        started.append(KvPeer("mooncake_tcp", secrets.token_hex(8), pages=PAGES))
        return started[-1]

    yield new
    for peer in started:
        peer.signal(signal.SIGCONT)
        peer.kill()


def test_killed_in_the_middle_of_a_push(prefill: Side, new_peer: NewPeer) -> None:
    peer = new_peer()
    assert prefill.do(push(peer.card, [0], [0])).outcome is Outcome.OK
    peer.signal(signal.SIGSTOP)  # the sockets hold less than what is pushed
    ticket = prefill.transfer.submit(push(peer.card, range(0, PAGES, 2), range(0, PAGES, 2)))
    begun = monotonic_ns()
    assert prefill.transfer.poll() == []
    peer.kill()
    (done,) = prefill.wait(ticket)
    assert done.outcome is Outcome.FAILED
    assert monotonic_ns() - begun < SOON_NS  # what was queued waits a second for a new connection


def test_stopped_before_the_first_contact(prefill: Side, new_peer: NewPeer) -> None:
    """The wheel hangs for a minute, and with it every other first contact and submit of the same engine."""
    known, stopped, unknown = new_peer(), new_peer(), new_peer()
    assert prefill.do(push(known.card, [0], [0])).outcome is Outcome.OK
    stopped.signal(signal.SIGSTOP)
    hanging = prefill.transfer.submit(push(stopped.card, [1], [1], deadline_ns=monotonic_ns() + 500 * NS_PER_MS))
    begun = monotonic_ns()
    others = [prefill.transfer.submit(push(peer.card, [2], [2])) for peer in (known, unknown)]
    done = {completion.ticket.id: completion for completion in prefill.wait(hanging, *others)}
    assert monotonic_ns() - begun < SOON_NS
    assert done[hanging.id].outcome is Outcome.FAILED
    assert all(done[ticket.id].outcome is Outcome.OK for ticket in others)
    stopped.signal(signal.SIGCONT)
    assert prefill.do(push(stopped.card, [3], [4])).outcome is Outcome.OK
    assert stopped.page(4) == prefill.pool.page(3)
    assert stopped.page(1) == bytes(SCHEMA.page_bytes)


def test_stopped_in_between_and_woken_again(prefill: Side, new_peer: NewPeer) -> None:
    """Given up after the library's time limits, not after half a minute; what it says then can be relied upon."""
    peer = new_peer()
    assert prefill.do(push(peer.card, [0], [0])).outcome is Outcome.OK
    peer.signal(signal.SIGSTOP)
    begun = monotonic_ns()
    done = prefill.do(push(peer.card, [1], [1], deadline_ns=begun + NS_PER_S))
    assert done.outcome is Outcome.FAILED
    assert monotonic_ns() - begun < SOON_NS
    peer.signal(signal.SIGCONT)
    assert prefill.do(push(peer.card, [2], [2])).outcome is Outcome.OK
    assert peer.page(2) == prefill.pool.page(2)
