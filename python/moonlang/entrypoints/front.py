"""What every HTTP process of ours begins and ends with: its socket, signals, uvicorn and its log."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn

from moonlang.base.errors import ConfigError

BACKLOG = 2048


def raise_open_files() -> None:
    """As many open files as this user may have: every client is one, and a router's has connections behind it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):  # a kernel may allow less than the limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Server(uvicorn.Server):
    """uvicorn that exits with 0 on signals."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains, a second one does not wait. Unlike uvicorn's, it is not raised again at the end."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Until uvicorn takes over, and after it, signals end the process in order: what was started is stopped."""

    def stop(sig: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on this address, bound before anything that takes long, so that a taken port is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} cannot be used: {error}.") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"Cannot listen on {host}:{port}: {error}.", hint="Choose another --port.") from error
        yield listener


def configure_logs(level: int, excluded: Sequence[str] = ()) -> None:
    """uvicorn's lines in the form of ours; none for paths that begin with one of `excluded`."""
    root = logging.getLogger("uvicorn")
    root.handlers[:] = logging.getLogger("moonlang").handlers
    root.propagate = False
    root.setLevel(level)
    logging.getLogger("uvicorn.error").setLevel(max(level, logging.WARNING))
    prefixes = tuple(excluded)
    if prefixes:
        logging.getLogger("uvicorn.access").addFilter(lambda record: not _access_path(record).startswith(prefixes))


def _access_path(record: logging.LogRecord) -> str:
    """The path in one of uvicorn's access records: client, method, path, HTTP version, status."""
    arguments: Any = record.args
    return str(arguments[2])
