"""Whose port it is: a master must not be taken for another's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from moonlang.mooncake import cluster


def test_free_ports_are_different() -> None:
    assert len(set(cluster.free_ports("127.0.0.1", 8))) == 8


def test_a_port_is_of_the_process_that_listens() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with socket.socket() as mine:
            mine.bind(("127.0.0.1", 0))
            port = mine.getsockname()[1]
            assert not cluster.listens(os.getpid(), port), "bound, and not listening"
            mine.listen()
            assert cluster.listens(os.getpid(), port)
            assert not cluster.listens(other.pid, port)
        assert not cluster.listens(os.getpid(), port)
        other.kill()
    assert not cluster.listens(other.pid, port)
