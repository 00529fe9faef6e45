"""The sockets of HTTP processes."""

from __future__ import annotations

import selectors
import socket

import pytest

from moonlang.base.errors import ConfigError
from moonlang.entrypoints import front


def test_a_taken_port_is_said() -> None:
    with front.listening("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        for bound in (front.listening, front.first_sharing):
            with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port}"), bound("127.0.0.1", port):
                pass


def test_workers_share_a_port_but_servers_do_not() -> None:
    with front.first_sharing("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with front.sharing("127.0.0.1", port) as second, selectors.DefaultSelector() as selector:
            for listener in (first, second):
                listener.listen()
                selector.register(listener, selectors.EVENT_READ)
            reached = set()
            for _ in range(200):  # the kernel deals out connections among those who listen
                with socket.create_connection(("127.0.0.1", port)):
                    ((key, _),) = selector.select(5)
                    accepted: socket.socket = key.fileobj  # type: ignore[assignment]
                    accepted.accept()[0].close()
                    reached.add(key.fd)
            assert reached == {first.fileno(), second.fileno()}
        with (
            pytest.raises(ConfigError, match="another server shares that port"),
            front.first_sharing("127.0.0.1", port),
        ):
            pass
    with front.first_sharing("127.0.0.1", port):
        pass
