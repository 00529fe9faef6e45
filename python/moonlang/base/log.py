"""Logging: one line per event, with the role that speaks; prompt text never appears."""

from __future__ import annotations

import logging
import sys

_FORMAT = "[%(asctime)s %(role)s] %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S"


class _RoleFilter(logging.Filter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def filter(self, record: logging.LogRecord) -> bool:
        record.role = self._role
        return True


def configure(role: str, level: str = "info") -> None:
    """Send this process's log to stderr. `role` is the name of the process in every line; `level` as in --log-level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
    handler.addFilter(_RoleFilter(role))
    root = logging.getLogger("moonlang")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def get(name: str) -> logging.Logger:
    """The logger of a module: `log = get(__name__)`."""
    return logging.getLogger(name)
