"""Calls to a bootstrap server: which prefill instances are behind it, and telling it of one more."""

from __future__ import annotations

import http.client
import socket
from contextlib import closing
from typing import Any

import msgspec

from moonlang.base.errors import PeerError
from moonlang.disaggregation.connection import Address

TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 1 << 20
QUERY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """Where the link of a prefill instance listens. host "": on the host of the bootstrap server."""

    instance: str
    host: str
    port: int


class _Answer(msgspec.Struct, frozen=True):
    instances: list[Instance] = []


def instances(site: Address) -> list[Instance]:
    """The prefill instances registered at a bootstrap server. PeerError: nobody there, or not a bootstrap server."""
    status, body = _call(site, "GET", QUERY)
    if status == http.client.SERVICE_UNAVAILABLE:
        return []
    try:
        if status == http.client.OK:
            return msgspec.json.decode(body, type=_Answer).instances
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # some other server
    raise _stranger(site, status)


def register(site: Address, route: dict[str, Any], token: str = "") -> None:
    """Tell a bootstrap server of a prefill instance; also keeps it known. PeerError when it does not take it."""
    _change(site, "PUT", "/route", route, token)


def withdraw(site: Address, instance: str, token: str = "") -> None:
    """Take an instance out. PeerError when the server is gone."""
    _change(site, "DELETE", "/route", {"instance": instance}, token)


def _change(site: Address, method: str, path: str, body: dict[str, Any], token: str) -> None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    status, _ = _call(site, method, path, msgspec.json.encode(body), headers)
    if status == http.client.UNAUTHORIZED:
        raise PeerError(f"The bootstrap server at {site[0]}:{site[1]} has another cluster token.")
    if status != http.client.OK:
        raise _stranger(site, status)


def resolve(address: Address) -> Address:
    """The numeric form of an address. PeerError when the name is unknown."""
    try:
        found = socket.getaddrinfo(address[0], address[1], type=socket.SOCK_STREAM)[0][4]
    except (OSError, ValueError) as error:  # the latter for names that cannot be
        raise PeerError(f"The name {address[0]!r} cannot be resolved: {_reason(error)}.") from error
    return str(found[0]), int(found[1])


def _call(
    site: Address, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    try:
        with closing(http.client.HTTPConnection(*site, timeout=TIMEOUT_S)) as connection:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PeerError(f"No bootstrap server answers at {site[0]}:{site[1]}: {_reason(error)}.") from error


def _stranger(site: Address, status: int) -> PeerError:
    return PeerError(
        f"What answers at {site[0]}:{site[1]} (status {status}) is not a bootstrap server.",
        hint="The router must name the prefill server's --disaggregation-bootstrap-port.",
    )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
