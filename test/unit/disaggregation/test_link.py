"""The link between instances: they find each other, talk, notice the end of each other, and say why they cannot."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from link_pair import SCHEMA, Bootstrap, Station

from moonlang.base import clock
from moonlang.core.pairing import Drained, Heard, Linked, Lost, PeerSpec, Release, Unreachable, Want
from moonlang.disaggregation import frames

FAR_NS = 120 * clock.NS_PER_S
SOON_NS = 30 * clock.NS_PER_S  # of what is noticed by itself


@pytest.fixture
def bootstrap() -> Iterator[Bootstrap]:
    server = Bootstrap()
    yield server
    server.close()


@pytest.fixture
def stations() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def prefill(bootstrap: Bootstrap, stations: contextlib.ExitStack, instance: str = "p1", **kwargs: object) -> Station:
    station = Station(instance, "prefill", **kwargs)  # type: ignore[arg-type]
    stations.callback(station.close)
    bootstrap.routes.append(station.route)
    return station


def decode(stations: contextlib.ExitStack, instance: str = "d1", **kwargs: object) -> Station:
    station = Station(instance, "decode", **kwargs)  # type: ignore[arg-type]
    stations.callback(station.close)
    return station


def seek(station: Station, bootstrap: Bootstrap, room: int, patience_ns: int = FAR_NS) -> None:
    spec = PeerSpec("127.0.0.1", bootstrap.port, room)
    station.link.open(spec, clock.monotonic_ns() + patience_ns)


def joined(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> tuple[Station, Station]:
    p, d = prefill(bootstrap, stations), decode(stations)
    p.link.claim(1)
    seek(d, bootstrap, 1)
    assert d.wait_for(Linked) == Linked(1, p.card)
    return p, d


def test_they_find_each_other_and_talk(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    p, d = joined(bootstrap, stations)
    want = Want(1, 5, b"key", 0, (3, 4), 1000)
    for message in (want, Release(1)):
        d.link.send("p1", message)
    assert [p.wait_for(Heard), p.wait_for(Heard)] == [Heard(d.card, want), Heard(d.card, Release(1))]
    p.link.send("d1", Drained(1))
    assert d.wait_for(Heard) == Heard(p.card, Drained(1))


def test_a_request_that_comes_late_is_found(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    p, d = joined(bootstrap, stations)
    seek(d, bootstrap, 7)
    seek(d, bootstrap, 8)
    p.link.claim(8)
    assert d.wait_for(Linked).room == 8
    p.link.claim(7)
    assert d.wait_for(Linked).room == 7


def test_a_room_is_used_again(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    p, d = joined(bootstrap, stations)
    p.link.claim(1)
    seek(d, bootstrap, 1)
    assert d.wait_for(Linked) == Linked(1, p.card)


def test_of_several_behind_one_port_the_one_with_the_request(
    bootstrap: Bootstrap, stations: contextlib.ExitStack
) -> None:
    ones = [prefill(bootstrap, stations, f"p{i}") for i in range(3)]
    d = decode(stations)
    for room in range(6):
        ones[room % 3].link.claim(room)
        seek(d, bootstrap, room)
        assert d.wait_for(Linked) == Linked(room, ones[room % 3].card)


def test_an_instance_that_registers_later_is_found(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    _, d = joined(bootstrap, stations)
    seek(d, bootstrap, 9)
    late = prefill(bootstrap, stations, "p2")
    late.link.claim(9)
    assert d.wait_for(Linked) == Linked(9, late.card)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": msgspec.structs.replace(SCHEMA, page_size=4)}, ("page_size", "2", "4")),
        ({"schema": msgspec.structs.replace(SCHEMA, dtype="bfloat16")}, ("dtype", "float32", "bfloat16")),
        ({"schema": msgspec.structs.replace(SCHEMA, fingerprint="others")}, ("fingerprint", "weights", "others")),
        ({"backend": "mooncake"}, ("--disaggregation-transfer-backend", "local", "mooncake")),
        ({"token": "secret"}, (frames.TOKEN_VARIABLE,)),
        ({"host": "127.0.0.2"}, None),
    ],
)
def test_those_who_do_not_fit_are_told_why(
    bootstrap: Bootstrap,
    stations: contextlib.ExitStack,
    change: dict[str, object],
    words: tuple[str, ...] | None,
) -> None:
    p, d = prefill(bootstrap, stations), decode(stations, **change)
    p.link.claim(1)
    seek(d, bootstrap, 1)
    if words is None:
        d.wait_for(Linked)
    else:
        error = d.wait_for(Unreachable, 2).error
        assert all(word in error for word in (*words, "127.0.0.1"))


def test_all_addresses_are_no_address(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    """Then each side is reached where the other one has met it."""
    p, d = prefill(bootstrap, stations, host="0.0.0.0"), decode(stations, host="0.0.0.0")
    assert p.link.address[0] == d.link.address[0] == ""
    p.link.claim(1)
    seek(d, bootstrap, 1)
    d.wait_for(Linked)


def test_decode_must_be_reached_where_it_says(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    p, d = prefill(bootstrap, stations), decode(stations)
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        d.link.address = dead.getsockname()
        p.link.claim(1)
        seek(d, bootstrap, 1)
        error = d.wait_for(Unreachable).error
    assert f"advertised address 127.0.0.1:{d.link.address[1]}" in error
    assert "--host" in error


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "h\n"])
def test_hosts_that_are_none(stations: contextlib.ExitStack, host: str) -> None:
    d = decode(stations)
    d.link.open(PeerSpec(host, 8998, 1), clock.monotonic_ns() + FAR_NS)
    assert d.wait_for(Unreachable).room == 1


def test_a_refusal_is_not_for_ever(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    misfit, d = prefill(bootstrap, stations, backend="fake"), decode(stations)
    seek(d, bootstrap, 1)
    d.wait_for(Unreachable)
    misfit.close()
    bootstrap.routes.clear()
    p = prefill(bootstrap, stations, "p2")
    p.link.claim(2)
    seek(d, bootstrap, 2)
    assert d.wait_for(Linked).card == p.card


def test_nobody_at_the_address(stations: contextlib.ExitStack, bootstrap: Bootstrap) -> None:
    d = decode(stations)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        d.link.open(PeerSpec("127.0.0.1", free.getsockname()[1], 3), clock.monotonic_ns() + FAR_NS)
        lost = d.wait_for(Unreachable)
    assert lost.room == 3
    assert "No bootstrap server answers" in lost.error
    assert "refused" in lost.error
    with socket.socket() as dead:  # registered, but its process is gone
        dead.bind(("127.0.0.1", 0))
        bootstrap.routes.append(("p1", "127.0.0.1", dead.getsockname()[1]))
        seek(d, bootstrap, 4)
        assert "refused" in d.wait_for(Unreachable).error


def test_a_request_that_never_comes(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    _, d = joined(bootstrap, stations)
    seek(d, bootstrap, 5, 300 * clock.NS_PER_MS)
    lost = d.wait_for(Unreachable)
    assert lost.room == 5
    assert "not reached" in lost.error


def test_the_end_of_an_instance_is_noticed_at_once(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    p, d = joined(bootstrap, stations)
    before_ns = clock.monotonic_ns()
    p.close()
    assert d.wait_for(Lost) == Lost("p1", "silent")
    assert not d.reach("p1")
    assert d.wait_for(Lost) == Lost("p1", "gone")
    assert clock.monotonic_ns() - before_ns < SOON_NS


def test_rooms_of_a_lost_decode_instance_are_released(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    """Those it was told of and has not asked for: without a Want nobody else knows whose they are."""
    p, d = joined(bootstrap, stations)
    seek(d, bootstrap, 2)
    p.link.claim(2)
    d.wait_for(Linked)
    d.link.send("p1", Want(1, 5, b"key", 0, (), 1000))
    p.wait_for(Heard)
    d.close()
    released = p.wait_for(Heard).body
    assert isinstance(released, Release)
    assert released.room == 2
    assert released.error


def test_an_answer_that_nobody_waits_for_any_more_is_passed_on(
    bootstrap: Bootstrap, stations: contextlib.ExitStack
) -> None:
    """So that the brain can tell the other half."""
    p, d = joined(bootstrap, stations)
    seek(d, bootstrap, 4, 200 * clock.NS_PER_MS)
    d.wait_for(Unreachable)
    p.link.claim(4)
    assert d.wait_for(Linked).room == 4


def test_garbage_closes_the_connection_and_nothing_else(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    p, d = joined(bootstrap, stations)
    for garbage in (b"\xff" * 64, b"\x05\0\0\0hello", b"GET / HTTP/1.1\r\n\r\n", frames.encode(Release(1))):
        with socket.create_connection(p.link.address, timeout=60) as stranger:
            stranger.sendall(garbage)
            assert stranger.recv(1024) == b""
    d.link.send("p1", Release(1))
    assert p.wait_for(Heard).body == Release(1)


CHILD = """
import sys
from link_pair import Station
p = Station("p1", "prefill")
p.link.claim(1)
print(*p.route, flush=True)
while True:
    p.wait(lambda event: p.link.send("d1", event.body) if hasattr(event, "body") else None, 60)
"""


def test_a_stopped_process_is_silent_and_may_come_back(bootstrap: Bootstrap, stations: contextlib.ExitStack) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, env=environment, text=True)
    stations.callback(child.wait)
    stations.callback(child.kill)
    assert child.stdout is not None
    with child.stdout:
        instance, host, port = child.stdout.readline().split()
    bootstrap.routes.append((instance, host, int(port)))
    d = decode(stations)
    seek(d, bootstrap, 1)
    d.wait_for(Linked)
    child.send_signal(signal.SIGSTOP)
    before_ns = clock.monotonic_ns()
    assert d.wait_for(Lost) == Lost("p1", "silent")
    assert clock.monotonic_ns() - before_ns < SOON_NS
    d.link.send("p1", Release(5))
    child.send_signal(signal.SIGCONT)
    assert d.wait_for(Heard).body == Release(5)
    assert d.reach("p1")
    child.kill()
    assert [d.wait_for(Lost).fate, d.wait_for(Lost).fate] == ["silent", "gone"]
