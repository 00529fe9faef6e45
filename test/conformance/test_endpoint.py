"""One suite for every Endpoint: inproc, zmq, mooncake within a host and between transfer engines, and inside the fault
wrapper with no faults."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
from free_ports import free_port

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.core.messages import (
    Abort,
    Control,
    Envelope,
    Generate,
    Message,
    Ready,
    Reply,
    StopHit,
    StreamHead,
    TextBatch,
    TextDelta,
    TokenBatch,
    TokenDelta,
)
from moonlang.core.plan import TokenLogprob
from moonlang.core.ports import Endpoint
from moonlang.core.request import Finish, LogprobSpec
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.messaging.faulty import Faults, FaultyEndpoint
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.messaging.zmq import ZmqEndpoint
from moonlang.mooncake import config, lib, probe
from moonlang.mooncake.endpoint import MooncakeEndpoint
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.ring import Geometry

DEADLINE_NS = 60 * NS_PER_S
SOON_NS = DEADLINE_NS // 2  # of what need not wait at all
SEND_TIMEOUT_NS = 300 * NS_PER_MS  # short, for it is waited for; longer than a busy machine takes for a message
CAPACITY = 8
SMALL = Geometry(ring_bytes=1 << 16, arena_bytes=1 << 22)

Opener = Callable[[str], Endpoint]


def _wrapped(opener: Opener) -> Opener:
    return lambda name: FaultyEndpoint(opener(name), Faults(seed=1))


class Lasting(Engine):
    """One engine for all tests: to close one takes a second."""

    def close(self) -> None:
        """It is closed with the process."""


@pytest.fixture(scope="session")
def engines() -> Callable[[], Engine]:
    """Two real transfer engines in turn; without the wheel the test is skipped."""
    if fix := lib.how_to_get():
        pytest.skip(fix)
    found = config.read({}, probe.hardware(), host="127.0.0.1", ib_device=None, force_tcp=True)
    return cycle([Lasting(found), Lasting(found)]).__next__


BACKENDS = ("inproc", "zmq", "mooncake", "engine")


@pytest.fixture(params=[*BACKENDS, *(f"faulty+{name}" for name in BACKENDS[:3])])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens endpoints named a, b, c of one group, with tiny inboxes and a short send timeout; closes them all."""
    opened: list[Endpoint] = []
    names = ("a", "b", "c")
    hub = Hub(names, capacity=CAPACITY)
    addresses = {name: f"ipc://{tmp_path}/{name}" for name in names}
    if request.param == "engine":
        new_engine = request.getfixturevalue("engines")
        addresses = {name: f"tcp://127.0.0.1:{free_port()}" for name in names}

    def plain(name: str) -> Endpoint:
        if request.param.endswith("inproc"):
            return InprocEndpoint(name, hub, send_timeout_ns=SEND_TIMEOUT_NS)
        if request.param == "engine":
            return MooncakeEndpoint(
                name,
                addresses,
                geometry=SMALL,
                send_timeout_ns=SEND_TIMEOUT_NS,
                new_engine=lambda host: new_engine(),
            )
        if request.param.endswith("mooncake"):
            return MooncakeEndpoint(name, addresses, geometry=SMALL, send_timeout_ns=SEND_TIMEOUT_NS)
        return ZmqEndpoint(name, addresses, capacity=CAPACITY, send_timeout_ns=SEND_TIMEOUT_NS)

    opener = _wrapped(plain) if request.param.startswith("faulty") else plain

    def remembered(name: str) -> Endpoint:
        opened.append(opener(name))
        return opened[-1]

    yield remembered
    for endpoint in opened:
        endpoint.close()
    hub.close()


def receive(endpoint: Endpoint, count: int) -> list[Envelope]:
    """Wait for `count` messages and return them."""
    found: list[Envelope] = []
    deadline = monotonic_ns() + DEADLINE_NS
    while len(found) < count:
        assert monotonic_ns() < deadline, f"only {len(found)} of {count} messages came"
        endpoint.wait(deadline - monotonic_ns())
        found += endpoint.recv()
    return found


SAMPLING = SamplingParams(stop=("a", "b"), logit_bias={3: -1.5}, grammar=GrammarSpec("regex", "a+"), seed=-(2**63))
LOGPROB = TokenLogprob(7, -0.5, ((-0.1, 3), (-0.2, 4)), ((-9.0, 1),))
HEAD = StreamHead(prompt_tokens=5, cached_tokens=4, stream=True, sampling=SAMPLING, queue_ns=12)
MESSAGES: list[Message] = [
    Generate("r", [1, 2], SAMPLING, True, LogprobSpec(0, 2, (9,)), 3, "salt", 1000),
    Abort("r", True, "why"),
    StopHit("r"),
    Control(1, "ping", {"a": [1, None, "x"]}),
    Reply(1, False, "no", {"b": {"c": 1.5}}),
    TokenBatch((TokenDelta("r", (1, 2), Finish("stop", 2), HEAD, (LOGPROB,), (TokenLogprob(1, None),), 2),)),
    TextBatch((TextDelta("r", "é\x00", (1, 2), Finish("stop", "é"), HEAD, (LOGPROB,), (), 2),)),
    Ready("scheduler", 4, {"pages": 10}),
]


@pytest.mark.parametrize("body", MESSAGES, ids=lambda body: type(body).__name__)
def test_every_message_arrives_equal(network: Opener, body: Message) -> None:
    a, b = network("a"), network("b")
    a.send("b", body)
    (envelope,) = receive(b, 1)
    assert envelope == Envelope(to="b", source="a", seq=0, body=body)
    assert type(envelope.body) is type(body)


def test_messages_keep_their_order_and_are_numbered_per_pair(network: Opener) -> None:
    a, b, c = network("a"), network("b"), network("c")
    for index in range(4):
        a.send("c", StopHit(f"a{index}"))
        b.send("c", StopHit(f"b{index}"))
    a.send("b", StopHit("other pair"))
    found = receive(c, 8)
    for source in ("a", "b"):
        of_source = [envelope for envelope in found if envelope.source == source]
        assert [envelope.seq for envelope in of_source] == [0, 1, 2, 3]
        assert [envelope.body for envelope in of_source] == [StopHit(f"{source}{index}") for index in range(4)]
    assert receive(b, 1)[0].seq == 0


def test_recv_returns_at_most_what_was_asked_and_never_blocks(network: Opener) -> None:
    a, b = network("a"), network("b")
    assert b.recv() == []
    for index in range(5):
        a.send("b", StopHit(str(index)))
    found: list[Envelope] = []
    while len(found) < 5:
        b.wait(DEADLINE_NS)
        batch = b.recv(2)
        assert len(batch) <= 2
        found += batch
    assert [envelope.seq for envelope in found] == list(range(5))


def test_a_message_may_be_sent_before_the_peer_is_there(network: Opener) -> None:
    a = network("a")
    a.send("b", StopHit("early"))
    assert receive(network("b"), 1)[0].body == StopHit("early")


def test_wait_ends_with_the_time(network: Opener) -> None:
    a = network("a")
    before = monotonic_ns()
    a.wait(20 * NS_PER_MS)
    a.wait(0)
    a.wait(-5)
    passed = monotonic_ns() - before
    assert 20 * NS_PER_MS <= passed < SOON_NS


def test_wait_ends_with_a_message_from_another_thread(network: Opener) -> None:
    a, b = network("a"), network("b")
    sender = threading.Thread(target=lambda: a.send("b", StopHit("x")))
    before = monotonic_ns()
    sender.start()
    b.wait(DEADLINE_NS)
    assert monotonic_ns() - before < SOON_NS
    sender.join()
    assert receive(b, 1)[0].body == StopHit("x")


def test_wait_ends_with_another_descriptor(network: Opener) -> None:
    b = network("b")
    wakeup = Wakeup()
    wakeup.set()
    before = monotonic_ns()
    b.wait(DEADLINE_NS, also=(wakeup.fileno(),))
    assert monotonic_ns() - before < SOON_NS
    wakeup.close()


def test_a_very_long_wait_is_a_legal_wait(network: Opener) -> None:
    a, b = network("a"), network("b")
    a.send("b", StopHit("x"))
    b.wait(2**63 - 1)
    assert receive(b, 1)


def readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_fileno_stays_readable_until_the_inbox_is_empty(network: Opener) -> None:
    a, b = network("a"), network("b")
    assert b.recv() == []
    assert not readable(b.fileno(), 0)
    for index in range(6):
        a.send("b", StopHit(str(index)))
    found = 0
    while found < 6:
        assert readable(b.fileno(), DEADLINE_NS / NS_PER_S), f"silent with {6 - found} messages to come"
        found += len(b.recv(1))
    b.recv()
    assert not readable(b.fileno(), 0)


def test_fileno_is_readable_after_wait_saw_the_message(network: Opener) -> None:
    a, b = network("a"), network("b")
    a.send("b", StopHit("x"))
    b.wait(DEADLINE_NS)
    assert readable(b.fileno(), DEADLINE_NS / NS_PER_S)
    assert len(receive(b, 1)) == 1


def test_no_wake_is_lost_under_asyncio(network: Opener) -> None:
    """Bursts and answers in both directions: the reader reads one message per wake and must still see all of them."""
    a, b = network("a"), network("b")
    total = 300
    seen: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def on_readable() -> None:
            for envelope in b.recv(1):
                seen.append(envelope.seq)
                b.send("c", StopHit("ack"))
                c.recv()
            if len(seen) == total and not done.done():
                done.set_result(None)

        loop.add_reader(b.fileno(), on_readable)
        sender = threading.Thread(target=burst)
        sender.start()
        await asyncio.wait_for(done, DEADLINE_NS / NS_PER_S)
        loop.remove_reader(b.fileno())
        sender.join()

    def burst() -> None:
        sent = 0
        deadline = monotonic_ns() + 2 * DEADLINE_NS
        while sent < total:
            try:
                a.send("b", StopHit("x"))
                sent += 1
            except PeerError:
                assert monotonic_ns() < deadline

    c = network("c")
    asyncio.run(main())
    assert seen == list(range(total))


def test_a_full_inbox_is_a_peer_error_within_bounded_time_and_nothing_is_lost(network: Opener) -> None:
    a, b = network("a"), network("b")
    large = Reply(0, True, "x" * 300_000)  # sockets buffer small frames beyond the capacity
    sent, refused, before = 0, "", 0
    while not refused and sent < 100:
        before = monotonic_ns()
        try:
            a.send("b", large)
            sent += 1
        except PeerError as error:
            refused = str(error)
    assert "stays full" in refused
    assert monotonic_ns() - before < SOON_NS
    assert sent >= CAPACITY
    assert [envelope.seq for envelope in receive(b, sent)] == list(range(sent))
    a.send("b", StopHit("room again"))
    assert receive(b, 1)[0].seq == sent


def test_an_unknown_peer_is_a_peer_error(network: Opener) -> None:
    with pytest.raises(PeerError, match="nobody"):
        network("a").send("nobody", StopHit("x"))


def test_close_twice(network: Opener) -> None:
    a = network("a")
    a.close()
    a.close()


def test_what_was_sent_before_close_arrives(network: Opener) -> None:
    a, b = network("a"), network("b")
    a.send("b", StopHit("last words"))
    a.close()
    assert receive(b, 1)[0].body == StopHit("last words")
