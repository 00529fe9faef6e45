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
KEEP_ALIVE_S = 75  # an idle connection: longer than clients keep theirs (5 s to 60 s), so that none writes into its end


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
    """Until uvicorn takes over, and after it, signals end the process in order: what was started is stopped.

    A terminal that is closed (SIGHUP) counts as SIGTERM all the time, unless nohup has us ignore it.
    """

    def stop(sig: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    def hang_up(sig: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on this address, bound before anything that takes long, so that a taken port is known at once."""
    with _bound(host, port) as listener:
        yield listener


@contextlib.contextmanager
def sharing(host: str, port: int) -> Iterator[socket.socket]:
    """One of several sockets on this address, among which the kernel deals out connections."""
    with _bound(host, port, socket.SO_REUSEPORT) as listener:
        yield listener


@contextlib.contextmanager
def first_sharing(host: str, port: int) -> Iterator[socket.socket]:
    """The first of them. Another server of ours cannot take the port as well while it is there, although the kernel
    would let it, and the two would answer each other's clients."""
    with sharing(host, port) as listener, socket.socket(socket.AF_UNIX) as claim:
        taken = listener.getsockname()[1]
        try:
            claim.bind(f"\0moonlang-port-{taken}")  # a name without a file, which ends with the socket
        except OSError as error:
            text = f"Cannot listen on {host}:{taken}: another server shares that port among its workers."
            raise ConfigError(text, hint="Choose another --port.") from error
        yield listener


@contextlib.contextmanager
def _bound(host: str, port: int, *options: int) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} cannot be used: {error}.") from error
    with listener:
        try:
            for option in (socket.SO_REUSEADDR, *options):
                listener.setsockopt(socket.SOL_SOCKET, option, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"Cannot listen on {host}:{port}: {error}.", hint="Choose another --port.") from error
        yield listener


def dialled(host: str) -> str:
    """Where to reach a server of this machine that listens on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def url(host: str, port: int, *, secure: bool = False) -> str:
    """The address of a server of this machine that listens on `host`."""
    host = dialled(host)
    return f"http{'s' if secure else ''}://{f'[{host}]' if ':' in host else host}:{port}"


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
