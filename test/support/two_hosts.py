"""Two network namespaces joined by a veth pair: two hosts, as far as the network is concerned. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

HOSTS = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class TwoHosts:
    """names: of the namespaces; HOSTS are their addresses."""

    names: tuple[str, str]

    def python(self, host: int, arguments: Sequence[str], **more: object) -> subprocess.Popen[str]:
        """Start Python on one of them."""
        command = ["ip", "netns", "exec", self.names[host], sys.executable, *arguments]
        return subprocess.Popen(command, text=True, **more)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def cut(self) -> None:
        """Pull the cable out."""
        _ip("-n", self.names[0], "link", "set", "v0", "down")

    def mend(self) -> None:
        _ip("-n", self.names[0], "link", "set", "v0", "up")


def why_not() -> str:
    """Why this machine cannot do it; "" when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    tried = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this kernel or container allows no network namespaces"


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    names = (f"moonlang-{os.getpid()}-0", f"moonlang-{os.getpid()}-1")
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", names[1])
        for name, host in zip(names, HOSTS, strict=True):
            _ip("-n", name, "address", "add", f"{host}/24", "dev", "v0")
            _ip("-n", name, "link", "set", "v0", "up")
        yield TwoHosts(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
