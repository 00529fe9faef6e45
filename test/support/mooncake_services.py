"""Mooncake's own programs for tests: started on free ports, stopped by the process that was started."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from free_ports import free_port

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s

START_NS = 90 * NS_PER_S


def program(name: str) -> str:
    """Path of a program that the wheel installs; skips the test without one."""
    path = Path(sys.executable).with_name(name)
    found = str(path) if path.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"Mooncake is not installed: there is no {name}")
    return found


def free_ports(count: int) -> list[int]:
    return [free_port() for _ in range(count)]


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_ns = monotonic_ns() + START_NS
    while monotonic_ns() < deadline_ns:
        assert process.poll() is None, f"it ended with status {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            sleep_s(0.02)
            continue
        return
    raise AssertionError(f"nobody listens on port {port}")


@dataclass
class Master:
    """A running mooncake_master. Leases are short and eviction early, as HiCache wants them."""

    port: int
    metrics_port: int
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


def start_master(port: int, metrics_port: int, log: Path, *options: str) -> Master:
    command = [
        program("mooncake_master"),
        f"--rpc_port={port}",
        "--rpc_address=127.0.0.1",
        "--metrics_host=127.0.0.1",
        f"--metrics_port={metrics_port}",
        "--rpc_thread_num=2",
        "--default_kv_lease_ttl=500",
        "--eviction_high_watermark_ratio=0.8",
        "--eviction_ratio=0.2",
        "--logtostderr=true",
        *options,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    wait_for_port(port, process)
    return Master(port, metrics_port, process)


class StoreService:
    """A running mooncake_store_service: the memory of a store, in a process of its own."""

    def __init__(self, folder: Path, master: str, segment: str) -> None:
        self.port = free_port()
        self._log = folder / f"service-{self.port}.log"
        config = folder / f"service-{self.port}.json"
        settings = {
            "local_hostname": "127.0.0.1",
            "metadata_server": "P2PHANDSHAKE",
            "master_server_address": master,
            "protocol": "tcp",
            "device_name": "",
            "global_segment_size": segment,
            "local_buffer_size": "16mb",
        }
        config.write_text(json.dumps(settings))
        self._command = [sys.executable, "-m", "mooncake.mooncake_store_service", f"--config={config}"]
        self._command.append(f"--port={self.port}")
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, again if it has ended."""
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(self._command, stdout=out, stderr=subprocess.STDOUT)
        wait_for_port(self.port, self.process)
        return self.process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def store_service(folder: Path, master: str, segment: str) -> Iterator[StoreService]:
    running = StoreService(folder, master, segment)
    try:
        yield running
    finally:
        running.kill()


@contextmanager
def client(folder: Path, master: str, segment: str) -> Iterator[str]:
    """A running mooncake_client, the owner of a host's memory: its address."""
    port = free_port()
    command = [
        program("mooncake_client"),
        f"--global_segment_size={segment}",
        f"--master_server_address={master}",
        "--metadata_server=P2PHANDSHAKE",
        "--host=127.0.0.1",
        f"--port={port}",
        "--threads=2",
    ]
    with (folder / "client.log").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for_port(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def master(folder: Path, *options: str) -> Iterator[Master]:
    port, metrics_port = free_port(), free_port()
    running = start_master(port, metrics_port, folder / "master.log", *options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
