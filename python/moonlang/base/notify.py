"""Tells whoever started this process how far it is: systemd (`Type=notify`) and `moonlang up` speak this protocol.

The starter names a datagram socket in NOTIFY_SOCKET; a message is lines of NAME=VALUE. Fields beginning with X_ are
ours, and systemd ignores them.
"""

from __future__ import annotations

import contextlib
import os
import socket

VARIABLE = "NOTIFY_SOCKET"
URL = "X_MOONLANG_URL"
SHARE = "X_MOONLANG_SHARE"


def ready(url: str = "") -> None:
    """The process takes requests, at `url`."""
    _send({"READY": "1", "STATUS": "ready"} | ({URL: url} if url else {}))


def doing(what: str, share: float | None = None) -> None:
    """What it does on the way there, in a word or two. share: of that, how much is done, in [0, 1]."""
    _send({"STATUS": what} | ({SHARE: f"{share:.3f}"} if share is not None else {}))


def stopping() -> None:
    """It takes no more requests and ends when those it has are done."""
    _send({"STOPPING": "1", "STATUS": "stopping"})


def fields(message: bytes) -> dict[str, str]:
    """What a message says, by name. Lines that are none are left out."""
    lines = message.decode(errors="replace").splitlines()
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}


def _send(said: dict[str, str]) -> None:
    """Without waiting: a starter that does not listen, or is gone, is no reason to stop."""
    path = os.environ.get(VARIABLE, "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as sender, contextlib.suppress(OSError):
        sender.sendto("\n".join(f"{name}={value}" for name, value in said.items()).encode(), address)
