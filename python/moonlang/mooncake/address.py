"""Where a mailbox is: `ipc://PATH` on this host, `tcp://HOST:PORT` on any; several, separated by commas."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from moonlang.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """One of them. path: of a Unix socket, "" for TCP."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"ipc://{self.path}" if self.path else f"tcp://{self.host}:{self.port}"

    @property
    def family(self) -> int:
        if self.path:
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def target(self) -> str | tuple[str, int]:
        """What `connect` and `bind` take."""
        return self.path or (self.host, self.port)


def parse(text: str) -> list[Address]:
    """All addresses in `text`. ConfigError when one is none."""
    found: list[Address] = []
    for part in text.split(","):
        scheme, _, rest = part.strip().partition("://")
        host, _, port = rest.rpartition(":")
        if scheme == "ipc" and rest:
            found.append(Address(path=rest))
        elif scheme == "tcp" and host and port.isdigit() and int(port) < 1 << 16:
            found.append(Address(host=host.strip("[]"), port=int(port)))
        else:
            raise ConfigError(f"{part!r} is no address of a mailbox.", hint="Use ipc://PATH or tcp://HOST:PORT.")
    return found


def nearest(addresses: list[Address]) -> Address:
    """The one to dial: a path whose folder is here, else the first over TCP. ConfigError when there is none."""
    for address in addresses:
        if not address.path or os.path.isdir(os.path.dirname(address.path)):
            return address
    raise ConfigError(f"None of these mailboxes can be reached from here: {', '.join(map(str, addresses))}.")
