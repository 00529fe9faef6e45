"""The public socket of a cluster, and the addresses of this host."""

from __future__ import annotations

import errno
import ipaddress
import socket

from moonlang.base.errors import ConfigError

FIRST_PORT = 30000
LAST_PORT = 30999  # of those that are tried when none is asked for
BACKLOG = 2048
_SOMEWHERE = ("192.0.2.1", 9)  # an address of no host: asked which of ours would be used to get there


def public_socket(host: str, port: int | None) -> socket.socket:
    """A listening socket. Without a port: the first free one from FIRST_PORT on. ConfigError when that cannot be.

    The supervisor keeps it, so that clients wait instead of being refused while a router is started again.
    """
    for tried in [port] if port is not None else range(FIRST_PORT, LAST_PORT + 1):
        try:
            return _listening(host, tried)
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                hint = "Choose another --host or --port."
                raise ConfigError(f"Cannot listen on {host}:{tried}: {error.strerror or error}.", hint=hint) from None
    raise ConfigError(f"All ports of {host} in [{FIRST_PORT}, {LAST_PORT}] are taken.", hint="Choose a --port.")


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # with SO_REUSEADDR it may only be this that finds the port taken
    except OSError:
        listener.close()
        raise
    return listener


def own_address(host: str) -> str:
    """The numeric address by which peers reach servers that are to listen on `host`."""
    try:
        found = str(socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this host: {error.strerror}.") from None
    if ipaddress.ip_address(found).is_unspecified:
        return address_towards(*_SOMEWHERE)
    return found


def address_towards(host: str, port: int) -> str:
    """Which of this host's addresses is used to reach that one; the loopback's when there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Whether only this host reaches it."""
    return ipaddress.ip_address(address).is_loopback
