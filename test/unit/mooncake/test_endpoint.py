"""What the conformance suite does not ask: who may connect, peers that go and come back, memory that stays bounded."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import thread_time_ns

import msgspec
import pytest

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import ConfigError, PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.core.messages import Envelope, Message, Reply, StopHit
from moonlang.mooncake import endpoint as endpoint_module
from moonlang.mooncake import greeting
from moonlang.mooncake.endpoint import MooncakeEndpoint
from moonlang.mooncake.patience import Patience
from moonlang.mooncake.ring import Geometry

DEADLINE_NS = 60 * NS_PER_S
SOON_NS = DEADLINE_NS // 2  # of what is noticed at once, or within the send timeout
SMALL = Geometry(ring_bytes=1 << 15, arena_bytes=1 << 17)
GREETINGS = int(os.environ.get("MOONLANG_FUZZ_GREETINGS", "300"))

Opener = Callable[..., MooncakeEndpoint]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opened: list[MooncakeEndpoint] = []

    def open_one(name: str, **more: object) -> MooncakeEndpoint:
        addresses = {peer: f"ipc://{tmp_path}/{peer}" for peer in ("a", "b")}
        options = {"token": "t", "geometry": SMALL, "send_timeout_ns": 100 * NS_PER_MS} | more
        opened.append(MooncakeEndpoint(name, addresses, **options))  # pyright: ignore[reportArgumentType]
        return opened[-1]

    yield open_one
    for endpoint in opened:
        endpoint.close()


def receive(endpoint: MooncakeEndpoint, count: int) -> list[Envelope]:
    found: list[Envelope] = []
    deadline = monotonic_ns() + DEADLINE_NS
    while len(found) < count:
        assert monotonic_ns() < deadline, f"only {len(found)} of {count} messages came"
        endpoint.wait(deadline - monotonic_ns())
        found += endpoint.recv()
    return found


def until_refused(endpoint: MooncakeEndpoint, to: str, body: Message) -> str:
    """What the first PeerError of sending says."""
    deadline = monotonic_ns() + DEADLINE_NS
    while monotonic_ns() < deadline:
        try:
            endpoint.send(to, body)
        except PeerError as error:
            return error.message
        endpoint.wait(NS_PER_MS)
    raise AssertionError("nothing was refused")


def until_taken(endpoint: MooncakeEndpoint, to: str, body: Message) -> None:
    deadline = monotonic_ns() + DEADLINE_NS
    while True:
        try:
            endpoint.send(to, body)
        except PeerError:
            assert monotonic_ns() < deadline
            endpoint.wait(NS_PER_MS)
        else:
            return


def test_who_does_not_know_the_token_is_refused_on_both_sides(opener: Opener) -> None:
    a, b = opener("a", token="other"), opener("b")
    a.send("b", StopHit("x"))
    assert "token" in until_refused(a, "b", StopHit("y"))
    assert b.recv() == []


def test_a_peer_that_closes_is_gone_and_numbers_begin_anew_when_it_is_back(opener: Opener) -> None:
    a, b = opener("a"), opener("b")
    a.send("b", StopHit("1"))
    receive(b, 1)
    b.close()
    assert "'b' is gone" in until_refused(a, "b", StopHit("2"))
    with pytest.raises(PeerError, match="gone"):
        a.send("b", StopHit("3"))
    again = opener("b")
    until_taken(a, "b", StopHit("4"))
    assert [envelope.seq for envelope in receive(again, 1)] == [0]


def test_what_a_dead_sender_has_stored_is_read_before_what_its_successor_says(opener: Opener) -> None:
    a, b = opener("a"), opener("b")
    for index in range(20):
        a.send("b", StopHit(f"old {index}"))
    a.close()
    opener("a").send("b", StopHit("new"))
    found = receive(b, 21)
    assert [envelope.body for envelope in found] == [*(StopHit(f"old {index}") for index in range(20)), StopHit("new")]
    assert found[-1].seq == 0


def test_a_slow_reader_bounds_memory_and_the_wait_and_loses_nothing(opener: Opener) -> None:
    a, b = opener("a"), opener("b")
    body = Reply(0, True, "x" * 1000)
    sent, refused = 0, ""
    begun = monotonic_ns()
    while not refused:
        try:
            a.send("b", body)
            sent += 1
        except PeerError as error:
            refused = error.message
    assert "stays full" in refused
    assert monotonic_ns() - begun < SOON_NS
    assert 10 < sent < (SMALL.ring_bytes + SMALL.arena_bytes) // 1000
    assert [envelope.seq for envelope in receive(b, sent)] == list(range(sent))


def test_large_messages_come_a_few_at_a_time_and_the_bell_goes_on(opener: Opener) -> None:
    """What one call decodes fits into a cache; what is left wakes its reader again."""
    whole = Geometry(arena_bytes=1 << 21)
    a, b = opener("a", geometry=whole), opener("b", geometry=whole)
    body = Reply(0, True, "x" * 100_000)
    a.send("b", body)
    receive(b, 1)
    for _ in range(8):
        a.send("b", body)
    counts: list[int] = []
    while sum(counts) < 8:
        b.wait(DEADLINE_NS)
        counts.append(len(b.recv()))
    assert counts == [3, 3, 2]


@pytest.mark.parametrize("size", [200_000, 2_000_000])
def test_a_message_larger_than_all_memory_passes_while_it_is_read(opener: Opener, size: int) -> None:
    a, b = opener("a"), opener("b", send_timeout_ns=DEADLINE_NS)
    body = Reply(0, True, "".join(random.Random(1).choices("abc", k=size)))
    found: list[Envelope] = []
    reader = threading.Thread(target=lambda: found.extend(receive(a, 1)))
    reader.start()
    b.send("a", body)
    reader.join()
    assert found[0].body == body


def test_an_envelope_in_another_name_is_dropped(opener: Opener) -> None:
    a, b = opener("a"), opener("b")
    a.send("b", StopHit("1"))
    receive(b, 1)
    a.name = "b"
    a.send("b", StopHit("forged"))
    a.name = "a"
    a.send("b", StopHit("3"))
    (found,) = receive(b, 1)
    assert found.body == StopHit("3")


def test_greetings_of_strangers_change_nothing(opener: Opener, tmp_path: Path) -> None:
    """MOONLANG_FUZZ_GREETINGS sets the number."""
    a, b = opener("a"), opener("b")
    a.send("b", StopHit("1"))
    receive(b, 1)
    draw = random.Random(3)
    hello = greeting.Hello(greeting.VERSION, "a", "b", b"i" * 16, b"", b"n" * 32, SMALL.ring_bytes, SMALL.arena_bytes)
    good = msgspec.msgpack.encode(hello)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(GREETINGS):
        body = bytearray(good) if draw.random() < 0.5 else bytearray(draw.randbytes(draw.randrange(200)))
        if draw.random() < 0.05:  # a list in a list in a list
            body = bytearray(good[:1] + b"\xa5Hello" + b"\x91" * 4000)
        for _ in range(draw.randrange(3)):
            if body:
                body[draw.randrange(len(body))] = draw.randrange(256)
        size = len(body) if draw.random() < 0.8 else draw.randrange(1 << 32)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger, suppress(ConnectionError):
            stranger.connect(f"{tmp_path}/b")
            stranger.sendall(size.to_bytes(4, "little") + body + draw.randbytes(draw.randrange(64)))
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(60)
            while stranger.recv(4096):
                pass
    assert b.recv() == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 4
    a.send("b", StopHit("2"))
    assert receive(b, 1)[0].seq == 1


_PEER = """
import sys
from moonlang.core.messages import StopHit
from moonlang.mooncake.endpoint import MooncakeEndpoint
from moonlang.mooncake.ring import Geometry
folder = sys.argv[1]
addresses = {name: f"ipc://{folder}/{name}" for name in ("a", "b")}
mailbox = MooncakeEndpoint("b", addresses, token="t", geometry=Geometry(1 << 15, 1 << 17))
mailbox.send("a", StopHit("here"))
while True:
    mailbox.wait(10**12)
    if mailbox.recv():
        mailbox.send("a", StopHit("read"))
"""


def segments(pid: int) -> list[str]:
    """Shared memory with the number of this process in its name."""
    return [entry.name for entry in Path("/dev/shm").iterdir() if str(pid) in re.findall(r"\d+", entry.name)]


def test_a_killed_peer_is_noticed_and_leaves_nothing(opener: Opener, tmp_path: Path) -> None:
    a = opener("a")
    with subprocess.Popen([sys.executable, "-c", _PEER, str(tmp_path)]) as child:
        receive(a, 1)
        until_taken(a, "b", StopHit("1"))
        receive(a, 1)  # they are connected: until then messages wait for a peer that may still come
        child.send_signal(signal.SIGKILL)
        begun = monotonic_ns()
        while "gone" not in until_refused(a, "b", StopHit("2")):  # its inbox may be full before the kernel has ended it
            assert monotonic_ns() - begun < SOON_NS
        assert monotonic_ns() - begun < SOON_NS
    assert segments(child.pid) == []
    b = opener("b")  # its socket is still there, and is taken over
    until_taken(a, "b", StopHit("3"))
    assert receive(b, 1)[0].seq == 0


def test_a_stopped_reader_is_a_full_inbox_within_the_send_timeout(opener: Opener, tmp_path: Path) -> None:
    a = opener("a")
    with subprocess.Popen([sys.executable, "-c", _PEER, str(tmp_path)]) as child:
        receive(a, 1)
        until_taken(a, "b", StopHit("1"))
        receive(a, 1)  # they are connected: until then messages wait for a peer that may still come
        child.send_signal(signal.SIGSTOP)
        try:
            begun = monotonic_ns()
            assert "stays full" in until_refused(a, "b", Reply(0, True, "x" * 4000))
            assert monotonic_ns() - begun < SOON_NS
        finally:
            child.kill()


def test_two_mailboxes_of_one_name_are_refused(opener: Opener) -> None:
    opener("a")
    with pytest.raises(ConfigError):
        opener("a")


@pytest.mark.parametrize("text", ["", "ipc://", "tcp://host", "tcp://h:70000", "unix:/x", "tcp://:1"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        MooncakeEndpoint("a", {"a": text})


class Keen(Patience):
    """Always stays awake first."""

    def begin(self, now_ns: int) -> bool:
        super().begin(now_ns)
        return True


@pytest.mark.parametrize(
    "moment", ["patience.Patience.begin", "patience.Patience.in_vain", "endpoint.fence", "endpoint.wait_ms"]
)
def test_no_message_is_missed_on_the_way_to_sleep(opener: Opener, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """It comes as a wait begins, when staying awake was in vain, once senders must ring, and just before the sleep."""
    monkeypatch.setattr("moonlang.mooncake.endpoint.Patience", Keen)
    a, b = opener("a"), opener("b")
    for _ in range(3):  # the lane is up, and has slept
        a.send("b", StopHit("before"))
        receive(b, 1)
        b.wait(NS_PER_MS)
    module, _, name = f"moonlang.mooncake.{moment}".rpartition(".")
    target = Patience if module.endswith("Patience") else endpoint_module
    real = getattr(target, name)

    def send_first(*args: object) -> object:
        monkeypatch.setattr(target, name, real)
        a.send("b", StopHit("now"))
        return real(*args)

    monkeypatch.setattr(target, name, send_first)
    begun_ns = monotonic_ns()
    found: list[Envelope] = []
    while not found:
        b.wait(4 * DEADLINE_NS)
        found = b.recv()
    assert monotonic_ns() - begun_ns < 2 * DEADLINE_NS
    assert [envelope.body for envelope in found] == [StopHit("now")]


def test_staying_awake_ends_with_another_descriptor(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonlang.mooncake.endpoint.Patience", Keen)
    a = opener("a")
    wakeup = Wakeup()
    wakeup.set()
    a.wait(1 << 62, also=(wakeup.fileno(),))  # or never
    wakeup.close()


def test_an_idle_reader_sleeps(opener: Opener) -> None:
    """Also after a burst that made it stay awake: what a process computes while nothing comes is next to nothing."""
    a, b = opener("a"), opener("b")
    for number in range(50):
        a.send("b", StopHit(str(number)))
        receive(b, 1)
    begun_ns = thread_time_ns()
    for _ in range(10):
        b.wait(20 * NS_PER_MS)
    assert thread_time_ns() - begun_ns < 100 * NS_PER_MS
