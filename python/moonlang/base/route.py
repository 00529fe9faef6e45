"""Which of this machine's addresses others see."""

from __future__ import annotations

import socket


def own_address(target: str, port: int = 9) -> str:
    """This machine's address on the way to `target`. OSError: there is no way."""
    family, kind, _, _, where = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing: it only looks up the way
        return probe.getsockname()[0]
