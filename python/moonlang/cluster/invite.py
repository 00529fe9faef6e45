"""How a host asks a running cluster what to bring."""

from __future__ import annotations

import http.client
from contextlib import closing

import msgspec

from moonlang.base.errors import ConfigError
from moonlang.cluster.membership import TOKEN_HEADER
from moonlang.cluster.plan import Invitation
from moonlang.disaggregation.connection import Address
from moonlang.version import __version__

TIMEOUT_S = 5.0
MAX_BYTES = 1 << 20


def ask(address: Address, token: str) -> Invitation:
    """The invitation that the router at `address` shows to whoever has the token. ConfigError says what is wrong."""
    where = f"{address[0]}:{address[1]}"
    try:
        with closing(http.client.HTTPConnection(*address, timeout=TIMEOUT_S)) as connection:
            connection.request("GET", "/cluster", headers={TOKEN_HEADER: token})
            reply = connection.getresponse()
            status, body = reply.status, reply.read(MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        hint = "Does the cluster run with a --host that this one reaches?"
        raise ConfigError(f"No cluster answers at {where}: {error}.", hint=hint) from None
    if status == http.client.UNAUTHORIZED:
        raise ConfigError(f"The cluster at {where} has another token.", hint="`moonlang status` shows it there.")
    try:
        found = msgspec.json.decode(body if status == http.client.OK else b"", type=Invitation)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigError(f"What answers at {where} (status {status}) is no cluster of `moonlang up`.") from None
    if found.version != __version__:
        raise ConfigError(f"The cluster at {where} runs MoonLang {found.version}, this host {__version__}.")
    return found
