"""Mooncake's engines find each other by real metadata servers."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from free_ports import free_port
from kv_peer import SCHEMA, KvPeer, Side, opener, push

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.core.ticket import Outcome
from moonlang.mooncake import lib

pytestmark = pytest.mark.skipif(bool(lib.how_to_get()), reason=f"Mooncake is not there: {lib.how_to_get()}")

PATIENCE_NS = 90 * NS_PER_S


def wait_until(ready: Callable[[], bool], what: str) -> None:
    deadline = monotonic_ns() + PATIENCE_NS
    while not ready():
        assert monotonic_ns() < deadline, f"{what} within {PATIENCE_NS / NS_PER_S} s"
        sleep_s(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port), f"{command[0]} listens")
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def http(port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, port):
        yield


@pytest.fixture(scope="module")
def http_port() -> Iterator[int]:
    port = free_port()
    with http(port):
        yield port


@pytest.fixture(scope="module")
def etcd_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One for all tests: the wheel connects a process to the first etcd that it is told of, and to no other."""
    if shutil.which("etcd") is None:
        pytest.skip("no etcd: apt-get install etcd-server")
    port = free_port()
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    command = ["etcd", "--data-dir", str(tmp_path_factory.mktemp("etcd"))]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]
    command += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
    with running(command, port):
        yield port


@pytest.mark.parametrize(
    ("server", "address"),
    [
        ("http", "http://127.0.0.1:{port}/metadata"),
        ("etcd", "etcd://127.0.0.1:{dead},127.0.0.1:{port}"),
        ("etcd", "etcd://127.0.0.1:{port}"),
        ("etcd", "127.0.0.1:{port}"),
    ],
)
def test_engines_meet_and_successors_too(
    server: str, address: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = request.getfixturevalue(f"{server}_port")
    monkeypatch.setenv("MOONCAKE_TE_META_DATA_SERVER", address.format(port=port, dead=free_port()))
    with ExitStack() as stack:
        prefill = Side(opener("mooncake_tcp"), "prefill")
        stack.callback(prefill.transfer.close)
        prefill.pool.fill(os.urandom(4 * SCHEMA.page_bytes))
        for _ in range(2):  # the second one starts when the first one has been killed
            peer = KvPeer("mooncake_tcp", secrets.token_hex(8))
            stack.callback(peer.kill)
            assert prefill.do(push(peer.card, [1, 3], [7, 6])).error == ""
            assert [peer.page(page) for page in (7, 6)] == [prefill.pool.page(page) for page in (1, 3)]
            peer.kill()
            assert prefill.do(push(peer.card, [1], [1])).outcome is Outcome.FAILED


def test_the_server_may_start_last(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MOONCAKE_TE_META_DATA_SERVER", f"http://127.0.0.1:{port}/metadata")
    with ExitStack() as stack:
        prefill = Side(opener("mooncake_tcp"), "prefill")
        stack.callback(prefill.transfer.close)
        peer = KvPeer("mooncake_tcp", secrets.token_hex(8))
        stack.callback(peer.kill)
        done = prefill.do(push(peer.card, [1], [1]))
        assert done.outcome is Outcome.FAILED
        assert "does not answer" in done.error
        with http(port):
            wait_until(lambda: prefill.do(push(peer.card, [1], [1])).outcome is Outcome.OK, "both engines have met")
