"""A Mooncake master and a store service with memory, for the benchmarks beside this file."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import engines

SEGMENT = "4gb"
_START_S = 30.0


def master_command(port: int) -> list[str]:
    """A master with the settings that HiCache wants: short leases, early eviction."""
    return [
        *(str(Path(sys.executable).parent / "mooncake_master"), f"--rpc_port={port}", "--rpc_address=127.0.0.1"),
        *(f"--metrics_port={engines.free_port()}", "--metrics_host=127.0.0.1", "--default_kv_lease_ttl=500"),
        *("--eviction_high_watermark_ratio=0.8", "--eviction_ratio=0.2"),
    ]


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens; RuntimeError when nobody does in time, or the process has ended."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nobody listens on port {port}")


@dataclass(frozen=True)
class Store:
    """address: of the master, HOST:PORT."""

    address: str
    master: subprocess.Popen[bytes]
    service: subprocess.Popen[bytes]


@contextmanager
def store(folder: Path) -> Iterator[Store]:
    """Both programs, logging into `folder`."""
    port, service = engines.free_port(), engines.free_port()
    config = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"127.0.0.1:{port}",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": SEGMENT,
        "local_buffer_size": "16mb",
    }
    (folder / "store.json").write_text(json.dumps(config))
    module = ["-m", "mooncake.mooncake_store_service", f"--config={folder / 'store.json'}", f"--port={service}"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in (("master", master_command(port)), ("service", [sys.executable, *module])):
            with (folder / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
            wait_for_port(port if name == "master" else service, running[-1])
        yield Store(f"127.0.0.1:{port}", *running)
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()
