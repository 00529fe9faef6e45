"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from moonlang.base.errors import ConfigError

_AMOUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(amount: object, what: str = "An amount of memory") -> int:
    """Bytes of 4294967296, "4gb", "500MB", "1.5 GiB" (units are powers of 1,024). ConfigError on anything else."""
    if isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0:
        return amount
    match = _AMOUNT.match(amount) if isinstance(amount, str) else None
    if match is None:
        raise ConfigError(f"{what} cannot be {amount!r}.", hint='Give bytes, or a number with a unit: "4gb", "500mb".')
    return int(float(match[1]) * 1024 ** _POWERS[match[2].lower()])
