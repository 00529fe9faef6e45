"""What Mooncake finds on this machine: for start-up and for `moonlang doctor`. What is missing comes with its fix."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from moonlang.base.errors import ConfigError
from moonlang.base.process_memory import host_key
from moonlang.base.route import own_address
from moonlang.mooncake import config as settings
from moonlang.mooncake import lib
from moonlang.mooncake.config import Hardware, MooncakeConfig

_CHILD_S: Final = 20.0
_CONNECT_S: Final = 2.0
# Ends by SIGABRT where the wheel has no plug-in for the address, and in order where it merely finds nobody there.
_TRY_METADATA: Final = """
import sys
from moonlang.mooncake import lib
lib.transfer_engine().initialize("127.0.0.1", sys.argv[1], "tcp", "")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a report."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    fix: str = ""


def hardware(folder: Path = Path("/sys/class/infiniband")) -> Hardware:
    """Look for RDMA cards and for the library that drives them."""
    cards = tuple(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else ()
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return Hardware(infiniband=cards, verbs=False)
    return Hardware(infiniband=cards, verbs=True)


def reachable(host: str) -> str:
    """The address under which others reach a server that listens on `host`, which may be "all addresses"."""
    if host not in ("", "0.0.0.0", "::"):
        return host
    try:
        return own_address("2001:db8::1" if host == "::" else "192.0.2.1")
    except OSError:  # no way out of this machine
        return "::1" if host == "::" else "127.0.0.1"


def check_metadata(config: MooncakeConfig) -> None:
    """ConfigError when the wheel would abort the process on this metadata server: tried out in a child process.

    Redis is the one kind that wheels are built without; where one brings it, it works.
    """
    if config.metadata_kind != "redis":
        return
    lib.transfer_engine()  # says it better than a child when there is none
    child = [sys.executable, "-c", _TRY_METADATA, "redis://127.0.0.1:1"]
    try:
        ended = subprocess.run(child, capture_output=True, check=False, timeout=_CHILD_S).returncode
    except subprocess.TimeoutExpired:
        return  # it tries to connect, so it knows how to
    if ended == -signal.SIGABRT:
        raise ConfigError(
            f"{lib.version()} has no support for the metadata server {config.metadata_server}.",
            hint=f'Set "metadata_server" to "{settings.P2P}" (no server needed), http://HOST:PORT/metadata '
            "or etcd://HOST:2379.",
        )


def probe(
    environ: Mapping[str, str] = os.environ, *, host: str = "127.0.0.1", device: str | None = None
) -> list[Finding]:
    """All findings, in the order in which one would fix them."""
    return list(_findings(environ, host, device))


def _findings(environ: Mapping[str, str], host: str, device: str | None) -> Iterator[Finding]:
    if fix := lib.how_to_get():
        missing = ", ".join(lib.missing_libraries()) if lib.version() else "its wheel"
        yield Finding(name="mooncake", status="warning", text=f"not usable: {missing} missing", fix=fix)
        return
    yield Finding(name="mooncake", status="ok", text=lib.version())
    for name in lib.DEADLY:
        if name in environ:
            yield Finding(name=name, status="warning", text="is ignored: Mooncake aborts on it", fix=f"Unset {name}.")
    try:
        found = settings.read(environ, hardware(), host=host, ib_device=device)
        check_metadata(found)
    except ConfigError as error:
        yield Finding(name="mooncake setup", status="failed", text=error.message, fix=error.hint)
        return
    cards = f" on {found.device_name}" if found.device_name else ""
    yield Finding(name="mooncake setup", status="ok", text=f"{found.protocol}{cards}, metadata {found.metadata_server}")
    yield from _metadata_server(found)
    if host_key():
        yield Finding(name="same-host path", status="ok", text="processes of this host write into each other's memory")
    else:
        yield Finding(
            name="same-host path", status="warning", text="not on this system: also neighbours use the network"
        )


def _metadata_server(config: MooncakeConfig) -> Iterator[Finding]:
    if config.metadata_kind == "p2p":
        return
    addresses = metadata_addresses(config)
    for host, port in addresses:
        try:
            with socket.create_connection((host, port), _CONNECT_S):
                yield Finding(name="metadata server", status="ok", text=f"{host}:{port} answers")
                return
        except OSError:
            continue
    where = ", ".join(f"{host}:{port}" for host, port in addresses)
    fix = "Start it (a prefill server serves /metadata at its bootstrap port), or correct its address."
    yield Finding(name="metadata server", status="warning", text=f"nobody answers at {where}", fix=fix)


def metadata_addresses(config: MooncakeConfig) -> list[tuple[str, int]]:
    """Host and port of each metadata server."""
    scheme, _, rest = config.metadata_server.partition("://")
    if scheme in ("http", "https"):
        url = urlsplit(config.metadata_server)
        return [(url.hostname or "", url.port or (443 if scheme == "https" else 80))]
    split = [address.rpartition(":") for address in rest.split(",")]
    return [(host.strip("[]"), int(port)) for host, _, port in split]
