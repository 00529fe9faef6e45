"""Mooncake's own services, for whoever runs them: the master of the store.

Its metadata is what peers tell each other (P2PHANDSHAKE), and its memory is what servers give to it, so that neither a
metadata server nor a store service is needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from moonlang.base.errors import ConfigError
from moonlang.mooncake import lib

_MASTER = "mooncake_master"
_LISTENING = "0A"  # in /proc/net/tcp
# With the defaults a full store refuses pages in bursts of ten seconds, until leases have run out.
_FOR_PAGES = ("--default_kv_lease_ttl=500", "--eviction_high_watermark_ratio=0.8", "--eviction_ratio=0.2")


def master_program() -> Path:
    """Path of the master, ready to be run. ConfigError without it."""
    spec = importlib.util.find_spec("mooncake")
    found = Path(spec.origin).with_name(_MASTER) if spec is not None and spec.origin is not None else Path()
    if lib.missing_libraries() or not found.is_file():
        raise ConfigError("The Mooncake store needs Mooncake.", hint=lib.how_to_get() or "Install the wheel again.")
    if not os.access(found, os.X_OK):
        found.chmod(found.stat().st_mode | stat.S_IXUSR)  # some installers lose the bit
    return found


def master_command(program: Path, host: str, port: int, metrics_port: int) -> tuple[str, ...]:
    """A master at host:port; host is numeric."""
    ports = (f"--rpc_port={port}", f"--metrics_port={metrics_port}", f"--metrics_host={host}", f"--rpc_address={host}")
    return (str(program), *ports, "--rpc_thread_num=2", "--logtostderr=true", *_FOR_PAGES)


def free_ports(host: str, count: int) -> list[int]:
    """Ports of `host` that are free now. The master cannot be given a socket: see `listens`."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket(_family(host))) for _ in range(count)]
        for one in found:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in found]


def listens(pid: int, port: int) -> bool:
    """Whether it is process `pid` that listens on the port. Another's master there would answer as well, and a second
    one on its port ends without a word."""
    sockets = {
        f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listeners(Path("/proc/net") / table, port)
    }
    return not sockets.isdisjoint(_open_files(pid))


def _open_files(pid: int) -> Iterator[str]:
    """What its descriptors lead to; nothing when it has ended."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed since
                yield os.readlink(link)


def _listeners(table: Path, port: int) -> list[str]:
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:  # no IPv6
        return []
    return [row[9] for row in rows if row[3] == _LISTENING and row[1].endswith(f":{port:04X}")]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
