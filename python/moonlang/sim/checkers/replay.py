"""The same case twice gives the same plans and the same deltas, to the byte."""

from __future__ import annotations

from typing import Protocol

from moonlang.sim.violation import Violation


class Repeatable(Protocol):
    """A world that has not run yet. digest: a hash over all that has happened."""

    @property
    def digest(self) -> str: ...
    def run(self) -> None: ...


def check(again: Repeatable, digest: str) -> None:
    """Violation unless a run of `again`, a fresh world without checkers, has this digest."""
    again.run()
    if again.digest != digest:
        raise Violation("replay", f"a second run has digest {again.digest}, the first one {digest}")
