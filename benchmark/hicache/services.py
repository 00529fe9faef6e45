"""A Mooncake master and a store service with memory, for the benchmarks beside this file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import engines

SEGMENT = "4gb"
_START_S = 2  # neither program says when it is up


@dataclass(frozen=True)
class Store:
    """address: of the master, HOST:PORT."""

    address: str
    master: subprocess.Popen[bytes]
    service: subprocess.Popen[bytes]


@contextmanager
def store(folder: Path) -> Iterator[Store]:
    """Both programs, logging into `folder`."""
    port, metrics, service = (engines.free_port() for _ in range(3))
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
    master = [
        *(str(Path(sys.executable).parent / "mooncake_master"), f"--rpc_port={port}", "--rpc_address=127.0.0.1"),
        *(f"--metrics_port={metrics}", "--metrics_host=127.0.0.1", "--default_kv_lease_ttl=500"),
        *("--eviction_high_watermark_ratio=0.8", "--eviction_ratio=0.2"),
    ]
    module = ["-m", "mooncake.mooncake_store_service", f"--config={folder / 'store.json'}", f"--port={service}"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in (("master", master), ("service", [sys.executable, *module])):
            with (folder / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(_START_S)
        yield Store(f"127.0.0.1:{port}", *running)
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()
