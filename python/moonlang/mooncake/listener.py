"""Takes connections at one address; each is handed to a thread of its own, and only so many at a time."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from moonlang.base import log
from moonlang.base.errors import ConfigError
from moonlang.mooncake.address import Address

MAX_CONNECTIONS: Final = 256  # greeted or being greeted
_BACKLOG: Final = 128

_log = log.get(__name__)


class Listener:
    """serve: called with every connection, in its own thread; the connection is closed when it returns."""

    def __init__(self, address: Address, serve: Callable[[socket.socket], None]) -> None:
        """ConfigError when the address cannot be listened on."""
        self._address = address
        self._serve = serve
        self._open = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._socket = _listen(address)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"listen-{address}", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Of TCP."""
        return self._socket.getsockname()[1]

    def close(self) -> None:
        """Take no more connections. Those that are open stay."""
        self._closing = True
        with suppress(OSError):  # it may have failed already
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._socket.close()
        if self._address.path:
            with suppress(FileNotFoundError):
                os.unlink(self._address.path)

    def _run(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if not self._closing:
                    _log.error("No more connections are taken at %s: %s", self._address, error)
                return
            if not self._open.acquire(blocking=False):
                _log.error("A connection is refused: %d are open.", MAX_CONNECTIONS)
                sock.close()
                continue
            threading.Thread(target=self._one, args=(sock,), name="lane", daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._serve(sock)
        finally:
            self._open.release()


def _listen(address: Address) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if address.path:
            _remove_dead(address.path)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address.target)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"Messages cannot be taken at {address}: {error}.") from error
    return sock


def _remove_dead(path: str) -> None:
    """Delete the socket of a process that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except FileNotFoundError:
            pass
