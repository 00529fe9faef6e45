"""Ports of 127.0.0.1 for servers of tests: below those that the kernel gives to clients, above those of Mooncake."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _LAST = 18_000, 28_999
_STRIDE = 1009  # between the first ones of processes that test at the same time
_drawn = itertools.count(os.getpid() * _STRIDE)


def free_port(neighbours: int = 0) -> int:
    """A port that nobody listens on, nor on the next `neighbours` ones. This process is not given it again."""
    while True:
        port = _FIRST + next(_drawn) % (_LAST - _FIRST)
        for _ in range(neighbours):
            next(_drawn)
        if all(map(_is_free, range(port, port + neighbours + 1))):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
