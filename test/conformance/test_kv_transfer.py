"""One suite for every KvTransfer that can be used here, also inside the fault wrapper."""

from __future__ import annotations

import os
import secrets
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from kv_peer import DEADLINE_NS, LAYER_BYTES, PAGES, SCHEMA, WHOLE, KvPeer, Open, Side, opener, push

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import KvCard, Span, Verify
from moonlang.core.ticket import Outcome
from moonlang.disaggregation.faulty import Faults, FaultyTransfer
from moonlang.mooncake import lib


@dataclass(frozen=True)
class Backend:
    name: str
    open: Open

    def __str__(self) -> str:
        return self.name


def _with_faults(backend: str, faults: Faults) -> Open:
    return lambda options: FaultyTransfer(opener(backend)(options), faults)


_no_mooncake = pytest.mark.skipif(bool(lib.how_to_get()), reason=f"Mooncake is not there: {lib.how_to_get()}")
NOTHING_MOVES = [Backend("fake", opener("fake"))]
BACKENDS = [
    Backend("local", opener("local")),
    Backend("local:faulty", _with_faults("local", Faults(seed=1))),
    Backend("local:late", _with_faults("local", Faults(seed=1, delay=0.5))),
    pytest.param(Backend("mooncake", opener("mooncake")), marks=_no_mooncake),
    pytest.param(Backend("mooncake_tcp", opener("mooncake_tcp")), marks=_no_mooncake),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that name `moving` get the backends that move bytes, the others all of them."""
    backends = [*BACKENDS, *([] if "moving" in metafunc.fixturenames else NOTHING_MOVES)]
    metafunc.parametrize("backend", backends, scope="module", ids=str)


@pytest.fixture(scope="module")
def moving(backend: Backend) -> Backend:
    return backend


NewSide = Callable[..., Side]


@pytest.fixture(scope="module")
def sides(backend: Backend) -> Iterator[tuple[Side, Side]]:
    """Prefill and decode of one process; closed when all tests of the backend are done."""
    prefill, decode = Side(backend.open, "prefill"), Side(backend.open, "decode", PAGES // 2)
    yield prefill, decode
    prefill.transfer.close()
    decode.transfer.close()


@pytest.fixture
def prefill(sides: tuple[Side, Side]) -> Side:
    sides[0].pool.fill(os.urandom(len(sides[0].pool.memory)))
    sides[0].linked = True
    return sides[0]


@pytest.fixture
def decode(sides: tuple[Side, Side]) -> Side:
    sides[1].pool.fill(bytes(len(sides[1].pool.memory)))
    return sides[1]


@pytest.fixture
def new_side(backend: Backend) -> Iterator[NewSide]:
    opened: list[Side] = []

    def new(instance: str, *, checksum: bool = True) -> Side:
        opened.append(Side(backend.open, instance, checksum=checksum))
        return opened[-1]

    yield new
    for side in opened:
        side.transfer.close()


def test_the_card_says_all_that_a_peer_needs(prefill: Side) -> None:
    card = prefill.card
    assert card.instance == "prefill"
    assert card.regions == (prefill.pool.region,)
    assert len(card.sessions) == len(card.handles) == 1


def test_a_push_completes_once_with_what_was_done(prefill: Side, decode: Side) -> None:
    done = prefill.do(push(decode.card, [1, 5], [2, 3]))
    assert (done.outcome, done.count, done.bytes, done.error) == (Outcome.OK, 2, 2 * SCHEMA.page_bytes, "")
    assert prefill.transfer.poll() == []


def test_the_descriptor_is_quiet_when_there_is_nothing(prefill: Side, decode: Side) -> None:
    assert prefill.transfer.poll() == []
    assert select.select([prefill.transfer.fileno()], [], [], 0)[0] == []
    prefill.do(push(decode.card, [1], [1]))
    assert prefill.transfer.poll() == []
    assert select.select([prefill.transfer.fileno()], [], [], 0)[0] == []


@pytest.mark.parametrize(
    ("source", "target"),
    [([3], [7]), ([1, 2, 3, 4], [5, 6, 7, 8]), ([1, 2, 3, 4], [8, 7, 6, 5]), ([9, 1, 2, 30], [4, 5, 31, 0])],
)
def test_pages_land_whole_and_nothing_else_changes(
    moving: Backend, prefill: Side, decode: Side, source: list[int], target: list[int]
) -> None:
    assert prefill.do(push(decode.card, source, target)).outcome is Outcome.OK
    expected = {there: prefill.pool.page(here) for here, there in zip(source, target, strict=True)}
    for page in range(PAGES // 2):
        assert decode.pool.page(page) == expected.get(page, bytes(SCHEMA.page_bytes))


@pytest.mark.parametrize(("pages", "spans"), [((), WHOLE), ((1,), ())])
def test_a_push_of_nothing_is_done(
    prefill: Side, decode: Side, pages: tuple[int, ...], spans: tuple[Span, ...]
) -> None:
    done = prefill.do(push(decode.card, pages, pages, spans))
    assert (done.outcome, done.bytes) == (Outcome.OK, 0)
    assert decode.do(Verify(room=1, pages=pages, spans=spans)).value == done.value


def test_a_card_that_makes_no_sense_is_an_error(moving: Backend, prefill: Side, decode: Side) -> None:
    region = decode.pool.region
    card = KvCard(
        instance="nonsense",
        backend=decode.card.backend,
        host=decode.card.host,
        regions=(region,),
        sessions=("?",),
        handles=("?",),
    )
    assert prefill.do(push(card, [1], [1])).outcome is Outcome.FAILED


def test_layer_groups_add_up(moving: Backend, prefill: Side, decode: Side) -> None:
    groups = [(Span(at, at, 2 * LAYER_BYTES),) for at in (0, 2 * LAYER_BYTES)]
    tickets = [prefill.transfer.submit(push(decode.card, [1, 2, 9], [4, 5, 6], spans)) for spans in groups]
    assert all(done.outcome is Outcome.OK for done in prefill.wait(*tickets))
    assert [decode.pool.page(page) for page in (4, 5, 6)] == [prefill.pool.page(page) for page in (1, 2, 9)]


def test_spans_go_where_they_belong(moving: Backend, prefill: Side, decode: Side) -> None:
    half = LAYER_BYTES // 2
    spans = (Span(0, half, half), Span(half, 3 * half, 10), Span(LAYER_BYTES, 0, 2))
    prefill.do(push(decode.card, [3, 8], [1, 2], spans))
    for here, there in ((3, 1), (8, 2)):
        source, found = prefill.pool.page(here), decode.pool.page(there)
        assert found[half : 2 * half] == source[:half]
        assert found[3 * half : 3 * half + 10] == source[half : half + 10]
        assert found[:2] == source[LAYER_BYTES : LAYER_BYTES + 2]
        assert found[2:half] == bytes(half - 2)


def test_the_checksum_of_the_push_is_that_of_what_landed(moving: Backend, prefill: Side, decode: Side) -> None:
    spans = (Span(0, LAYER_BYTES, LAYER_BYTES), Span(2 * LAYER_BYTES, 0, 100))
    pushed = prefill.do(push(decode.card, [1, 2, 3], [9, 8, 7], spans))
    verify = Verify(room=1, pages=(9, 8, 7), spans=spans)
    assert decode.do(verify).value == pushed.value != 0
    damaged = bytearray(decode.pool.memory[:])
    damaged[8 * SCHEMA.page_bytes + 99] ^= 1
    decode.pool.fill(bytes(damaged))
    assert decode.do(verify).value != pushed.value


def test_no_checksum_where_none_is_wanted(moving: Backend, new_side: NewSide, decode: Side) -> None:
    plain = new_side("plain", checksum=False)
    plain.pool.fill(os.urandom(SCHEMA.page_bytes))
    assert plain.do(push(decode.card, [0], [1])).value == 0
    assert decode.pool.page(1) == plain.pool.page(0)
    assert plain.do(Verify(room=1, pages=(0,), spans=WHOLE)).value == 0


def test_ops_to_one_peer_are_done_in_order(moving: Backend, prefill: Side, decode: Side) -> None:
    tickets = [prefill.transfer.submit(push(decode.card, [page], [1])) for page in range(PAGES)]
    assert all(earlier.id < later.id for earlier, later in pairwise(tickets))
    done = prefill.wait(*tickets)
    assert all(completion.outcome is Outcome.OK for completion in done)
    assert decode.pool.page(1) == prefill.pool.page(PAGES - 1)


def test_each_poll_is_sorted(prefill: Side, decode: Side) -> None:
    tickets = [prefill.transfer.submit(push(decode.card, [page], [page])) for page in range(16)]
    found: list[int] = []
    deadline = monotonic_ns() + DEADLINE_NS
    while len(found) < len(tickets):
        assert monotonic_ns() < deadline
        ids = [done.ticket.id for done in prefill.transfer.poll()]
        assert ids == sorted(ids)
        found += ids


def test_two_peers_at_once(moving: Backend, new_side: NewSide, prefill: Side, decode: Side) -> None:
    other = new_side("another decode")
    tickets = []
    for page in range(8):
        tickets += [prefill.transfer.submit(push(card, [page], [page])) for card in (decode.card, other.card)]
    assert all(done.outcome is Outcome.OK for done in prefill.wait(*tickets))
    for page in range(8):
        assert decode.pool.page(page) == other.pool.page(page) == prefill.pool.page(page)


def test_a_cancelled_push_completes_and_nothing_comes_after_it(moving: Backend, prefill: Side, decode: Side) -> None:
    outcomes = {Outcome.OK}
    while outcomes == {Outcome.OK}:  # a busy machine may have done them all before the first is cancelled
        tickets = [prefill.transfer.submit(push(decode.card, range(32), range(32))) for _ in range(8)]
        for ticket in reversed(tickets):
            prefill.transfer.cancel(ticket)
        outcomes = {completion.outcome for completion in prefill.wait(*tickets)}
    assert outcomes <= {Outcome.OK, Outcome.CANCELLED}
    decode.pool.fill(bytes(len(decode.pool.memory)))
    assert prefill.do(push(decode.card, [0], [0])).outcome is Outcome.OK  # behind whatever is left in the lane
    assert decode.pool.page(1) == bytes(SCHEMA.page_bytes)


def test_cancel_after_the_end_changes_nothing(prefill: Side, decode: Side) -> None:
    ticket = prefill.transfer.submit(push(decode.card, [0], [0]))
    prefill.wait(ticket)
    prefill.transfer.cancel(ticket)
    assert prefill.transfer.poll() == []


def test_a_deadline_in_the_past_fails_without_a_byte(moving: Backend, prefill: Side, decode: Side) -> None:
    done = prefill.do(push(decode.card, [1], [1], deadline_ns=monotonic_ns()))
    assert done.outcome is Outcome.FAILED
    assert "time limit" in done.error
    assert decode.pool.page(1) == bytes(SCHEMA.page_bytes)


def test_a_peer_that_is_out_of_reach_gets_nothing(moving: Backend, prefill: Side, decode: Side) -> None:
    prefill.linked = False
    done = prefill.do(push(decode.card, [1], [1]))
    assert done.outcome is Outcome.FAILED
    assert "out of reach" in done.error
    assert decode.pool.page(1) == bytes(SCHEMA.page_bytes)


def test_close_ends_what_is_under_way_and_may_be_called_twice(new_side: NewSide, decode: Side) -> None:
    side = new_side("closed")
    for _ in range(16):
        side.transfer.submit(push(decode.card, range(32), range(32)))
    before = monotonic_ns()
    side.transfer.close()
    side.transfer.close()
    assert monotonic_ns() - before < 4 * NS_PER_S


@pytest.fixture
def remote(moving: Backend) -> Iterator[KvPeer]:
    """Decode in another process."""
    peer = KvPeer(moving.name.partition(":")[0], secrets.token_hex(8))
    yield peer
    peer.kill()


def test_pages_reach_another_process(prefill: Side, remote: KvPeer) -> None:
    assert prefill.do(push(remote.card, [1, 2, 3], [6, 5, 63])).outcome is Outcome.OK
    assert [remote.page(page) for page in (6, 5, 63)] == [prefill.pool.page(page) for page in (1, 2, 3)]
    assert remote.page(4) == bytes(SCHEMA.page_bytes)


def test_a_peer_that_died_fails_within_a_second(prefill: Side, remote: KvPeer) -> None:
    assert prefill.do(push(remote.card, [1], [1])).outcome is Outcome.OK
    remote.kill()
    before = monotonic_ns()
    done = prefill.do(push(remote.card, [1], [1]))
    assert (done.outcome, done.bytes) == (Outcome.FAILED, 0)
    assert monotonic_ns() - before < NS_PER_S


def test_the_card_of_a_predecessor_opens_nothing(prefill: Side, remote: KvPeer) -> None:
    """A card with another instance, as it is held of a process whose successor has taken its address."""
    old = KvCard(
        instance="predecessor",
        backend=remote.card.backend,
        host=remote.card.host,
        regions=remote.card.regions,
        sessions=remote.card.sessions,
        handles=remote.card.handles,
    )
    done = prefill.do(push(old, [1], [1]))
    assert done.outcome is Outcome.FAILED
    assert remote.page(1) == bytes(SCHEMA.page_bytes)


def test_pages_that_the_peer_does_not_have_are_refused(prefill: Side, remote: KvPeer) -> None:
    region = remote.card.regions[0]
    nowhere = KvRegion(address=4096, stride=region.stride, num_pages=region.num_pages, schema=region.schema)
    card = KvCard(
        instance=remote.card.instance,
        backend=remote.card.backend,
        host=remote.card.host,
        regions=(nowhere,),
        sessions=remote.card.sessions,
        handles=remote.card.handles,
    )
    done = prefill.do(push(card, [1], [1]))
    assert done.outcome is Outcome.FAILED
    assert done.error
