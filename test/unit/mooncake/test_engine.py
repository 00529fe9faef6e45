"""Every trap of the wheel, on a fake one that has them all."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from moonlang.base.errors import BugError, ConfigError, PeerError
from moonlang.mooncake import engine as engine_module
from moonlang.mooncake.config import MooncakeConfig
from moonlang.mooncake.engine import MAX_FLIGHTS, Engine, Peer
from moonlang.mooncake.fake import FakeNetwork, FakeWheel
from moonlang.mooncake.wheel import FAILED, TIMED_OUT

CONFIG = MooncakeConfig(local_hostname="127.0.0.1")
CONTACT_NS = NS_PER_S  # short, for it is waited for; longer than a busy machine takes for an answer
SOON_NS = 30 * NS_PER_S
TAG = bytes(range(32))
OTHER_TAG = bytes(32)


class StoppedError(Exception):
    """What a caller raises to stop a write."""


class Side:
    """An engine with a pool and a tag."""

    def __init__(self, network: FakeNetwork, size: int = 1 << 16, tag: bytes = TAG) -> None:
        self.wheels: list[FakeWheel] = []
        self.engine = Engine(CONFIG, lambda: self._new(network), contact_ns=CONTACT_NS)
        self.pool = ctypes.create_string_buffer(size)
        self.address = ctypes.addressof(self.pool)
        self.tag = ctypes.create_string_buffer(tag, len(tag))
        self.engine.register(self.address, size)
        self.engine.register(ctypes.addressof(self.tag), len(tag))

    def _new(self, network: FakeNetwork) -> FakeWheel:
        self.wheels.append(FakeWheel(network))
        return self.wheels[-1]

    @property
    def wheel(self) -> FakeWheel:
        return self.wheels[0]

    def peer(self, tag: bytes = TAG) -> Peer:
        return Peer(self.engine.session(ctypes.addressof(self.tag)), tag)


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def prefill(network: FakeNetwork) -> Iterator[Side]:
    side = Side(network)
    side.pool.raw = os.urandom(len(side.pool))
    yield side
    side.engine.close()


@pytest.fixture
def decode(network: FakeNetwork) -> Iterator[Side]:
    side = Side(network)
    yield side
    network.resume(side.engine.name)
    side.engine.close()


def write(
    source: Side, target: Side, entries: int = 8, peer: Peer | None = None, go_on: Callable[[], None] = lambda: None
) -> None:
    """Write the pool in equal entries."""
    size = len(source.pool) // entries
    at = np.arange(entries, dtype=np.uint64) * np.uint64(size)
    sizes = np.full(entries, size, np.uint64)
    here, there = at + np.uint64(source.address), at + np.uint64(target.address)
    source.engine.write(peer or target.peer(), here, there, sizes, go_on)


def test_everything_arrives(prefill: Side, decode: Side) -> None:
    write(prefill, decode)
    assert decode.pool.raw == prefill.pool.raw


def test_few_entries_are_in_flight(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    write(prefill, decode, entries=4096)
    assert len(network.written) == 4096
    assert prefill.wheel.most_pending == MAX_FLIGHTS


def test_few_bytes_are_in_flight(
    monkeypatch: pytest.MonkeyPatch, network: FakeNetwork, prefill: Side, decode: Side
) -> None:
    monkeypatch.setattr(engine_module, "MAX_FLIGHT_BYTES", 1 << 14)
    write(prefill, decode, entries=16)
    assert prefill.wheel.most_pending == 4
    write(prefill, decode, entries=1)  # larger than the bound: alone
    assert network.written[-1] == 1 << 16


def test_a_failed_write_is_tried_once_more(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    network.failures.extend([1, FAILED, 1, FAILED])
    write(prefill, decode)
    assert decode.pool.raw == prefill.pool.raw
    assert len(network.written) == 8


def test_what_fails_twice_is_an_error_after_all_has_ended(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    network.failures.extend([FAILED] * 16)
    with pytest.raises(PeerError, match="8 of 8"):
        write(prefill, decode)
    assert prefill.wheel.pending == 0


def test_a_timed_out_write_is_awaited_to_its_end(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    network.failures.extend([TIMED_OUT, TIMED_OUT, FAILED])
    write(prefill, decode, entries=1)
    assert decode.pool.raw == prefill.pool.raw


def test_a_peer_that_is_gone_fails_at_once(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    peer = decode.peer()
    write(prefill, decode, peer=peer)
    network.gone.add(peer.name)
    before = monotonic_ns()
    with pytest.raises(PeerError, match="is gone"):
        write(prefill, decode, peer=peer)
    assert monotonic_ns() - before < SOON_NS
    assert prefill.wheel.pending == 0


def test_a_successor_behind_the_address_gets_nothing(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    peer = decode.peer()
    write(prefill, decode, peer=peer)
    decode.pool.raw = bytes(len(decode.pool))
    decode.tag.raw = OTHER_TAG
    network.failures.append(FAILED)  # as the first write to a successor does
    network.checks = 0
    with pytest.raises(PeerError, match="restarted"):
        write(prefill, decode, entries=1, peer=peer)
    assert decode.pool.raw == bytes(len(decode.pool))


def test_a_wrong_tag_is_noticed_before_the_first_write(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    with pytest.raises(PeerError, match="restarted"):
        write(prefill, decode, peer=decode.peer(OTHER_TAG))
    assert network.written == []


def test_a_stopped_peer_holds_up_nobody_else(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    stopped = Side(network)
    network.stopped.add(stopped.engine.name)
    with pytest.raises(PeerError, match="does not answer"):
        write(prefill, stopped)
    before = monotonic_ns()
    write(prefill, decode)  # the engine itself hangs nowhere
    assert monotonic_ns() - before < SOON_NS
    with pytest.raises(PeerError, match="does not answer"):
        write(prefill, stopped)
    network.resume(stopped.engine.name)
    write(prefill, stopped)
    assert stopped.pool.raw == prefill.pool.raw
    assert len(prefill.wheels) <= 3  # the engine, the scout that hung, and one more


def test_waiting_for_a_stopped_peer_can_be_ended(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    network.stopped.add(decode.engine.name)

    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        write(prefill, decode, go_on=stop)


def test_stopping_waits_for_what_flies(network: FakeNetwork, prefill: Side, decode: Side) -> None:
    network.checks = 20
    calls = 0

    def stop_later() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise StoppedError

    peer = decode.peer()
    write(prefill, decode, peer=peer)
    network.written.clear()
    with pytest.raises(StoppedError):
        write(prefill, decode, peer=peer, go_on=stop_later)
    assert prefill.wheel.pending == 0
    assert len(network.written) == 4


def test_writes_that_never_end_are_given_up(
    monkeypatch: pytest.MonkeyPatch, network: FakeNetwork, prefill: Side, decode: Side
) -> None:
    peer = decode.peer()
    write(prefill, decode, peer=peer)
    network.stopped.add(peer.name)
    monkeypatch.setattr(engine_module, "STALL_NS", 20 * NS_PER_MS)
    with pytest.raises(PeerError, match="lost 8 writes"):
        write(prefill, decode, peer=peer)


def test_memory_that_is_not_registered_is_refused(prefill: Side, decode: Side) -> None:
    stranger = ctypes.create_string_buffer(8)
    where = np.array([ctypes.addressof(stranger)], np.uint64)
    with pytest.raises(PeerError, match="1 of 1"):
        prefill.engine.write(decode.peer(), where, where, np.array([8], np.uint64), lambda: None)


def test_an_engine_taken_along_by_fork_is_refused(monkeypatch: pytest.MonkeyPatch, prefill: Side, decode: Side) -> None:
    peer = decode.peer()
    with monkeypatch.context() as child:
        child.setattr(engine_module.os, "getpid", lambda: -1)
        with pytest.raises(BugError, match="forked"):
            write(prefill, decode, peer=peer)


def test_a_closed_engine_is_an_error(network: FakeNetwork, decode: Side) -> None:
    closed = Side(network)
    closed.engine.close()
    with pytest.raises(PeerError, match="closed"):
        write(closed, decode)


def test_the_log_says_once_that_it_listens_everywhere(network: FakeNetwork, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moonlang.mooncake.engine"):
        Side(network)
    (record,) = caplog.records
    assert "listens on all interfaces" in record.message


def test_too_few_ports_are_refused(monkeypatch: pytest.MonkeyPatch, network: FakeNetwork) -> None:
    monkeypatch.setenv("MC_MIN_RPC_PORT", "15000")
    monkeypatch.setenv("MC_MAX_RPC_PORT", "15014")
    with pytest.raises(ConfigError, match="fewer than 16 ports"):
        Side(network)
    monkeypatch.setenv("MC_MAX_RPC_PORT", "15015")
    Side(network)


def test_an_engine_that_cannot_listen_is_a_config_error(network: FakeNetwork) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        Engine(CONFIG, lambda: FakeWheel(network, initialises=-1))


def test_a_metadata_server_may_come_later(monkeypatch: pytest.MonkeyPatch, network: FakeNetwork) -> None:
    monkeypatch.setattr(engine_module, "RETRY_NS", NS_PER_MS)
    config = MooncakeConfig(local_hostname="127.0.0.1", metadata_server="http://127.0.0.1:1/metadata")
    answers = iter([-1, -1, 0])
    tried = threading.Semaphore(0)

    def new_wheel() -> FakeWheel:
        tried.release()
        return FakeWheel(network, initialises=next(answers))

    engine = Engine(config, new_wheel)
    pool = ctypes.create_string_buffer(8)
    engine.register(ctypes.addressof(pool), 8)
    name = engine.name  # known before it can be reached
    for _ in range(3):
        assert tried.acquire(timeout=60)
    deadline = monotonic_ns() + 60 * NS_PER_S
    while name not in network.engines or not network.engines[name]._regions:
        assert monotonic_ns() < deadline
    engine.close()


def test_every_engine_has_a_new_name_in_the_metadata_server(network: FakeNetwork) -> None:
    """The name of one that crashed stays there, and would be refused."""
    config = MooncakeConfig(local_hostname="127.0.0.1", metadata_server="http://127.0.0.1:1/metadata")
    names = {Engine(config, lambda: FakeWheel(network)).name for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("127.0.0.1-") for name in names)
