"""Tokens by Mooncake: through shared memory within a host, by its transfer engine between hosts."""

from __future__ import annotations

from moonlang.mooncake.exchange import check, open_exchange

__all__ = ["BACKEND", "check"]

BACKEND = open_exchange
