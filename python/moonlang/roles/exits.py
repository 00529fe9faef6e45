"""The end of a role, as its owner hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from signal import SIGKILL, Signals

from moonlang.base.errors import ConfigError, MoonLangError, PeerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """status: exit status, negative for a signal. lines: the end of its stderr. error: what it said itself."""

    name: str
    status: int
    lines: tuple[str, ...] = ()
    error: MoonLangError | None = None

    def as_error(self) -> MoonLangError:
        """The error to raise when this happened during start-up."""
        if isinstance(self.error, ConfigError):
            return self.error
        text = "\n".join((f"The {self.name} {describe(self.status)}.", *(f"  {line}" for line in self.lines)))
        hint = "\nIt may have been out of memory." if self.status == -SIGKILL else ""
        return PeerError(text, hint=hint)


OnExit = Callable[[Exit], None]


def describe(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"was killed by {Signals(-status).name}"
    return f"ended with status {status}"
