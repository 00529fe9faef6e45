"""The mailbox of a role in its own process, by --messaging-backend. Only what is chosen is imported."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping

from moonlang.base import registry
from moonlang.core.ports import Endpoint
from moonlang.disaggregation.frames import TOKEN_VARIABLE

_TOKEN_BYTES = 16

OpenMailbox = Callable[[str, dict[str, str], str], Endpoint]


def open_mailbox(backend: str, name: str, addresses: dict[str, str], token: str) -> Endpoint:
    """Mailbox `name`. addresses: of all roles. token: what whoever connects must know. ConfigError: not possible."""
    opener: OpenMailbox = registry.find("messaging", backend).BACKEND
    return opener(name, addresses, token)


def cluster_token(environ: Mapping[str, str] = os.environ) -> str:
    """The user's, or one for this start alone."""
    return environ.get(TOKEN_VARIABLE) or secrets.token_hex(_TOKEN_BYTES)
