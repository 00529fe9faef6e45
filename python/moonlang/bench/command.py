"""`moonlang bench WHAT ...`."""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.base.errors import ConfigError
from moonlang.bench import messaging

_MEASUREMENTS = {"messaging": messaging.main}


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in _MEASUREMENTS:
        return _MEASUREMENTS[argv[0]](argv[1:])
    raise ConfigError("moonlang bench needs to know what to measure.", hint=f"One of: {', '.join(_MEASUREMENTS)}.")
