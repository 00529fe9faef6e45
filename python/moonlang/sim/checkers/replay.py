"""The same case twice gives the same plans and the same deltas, to the byte."""

from __future__ import annotations

from moonlang.sim.violation import Violation
from moonlang.sim.workload import Case
from moonlang.sim.world import World


def check(case: Case, digest: str) -> None:
    """Violation unless a fresh run of `case`, without checkers, has this digest."""
    again = World(case, ())
    again.run()
    if again.digest != digest:
        raise Violation("replay", f"a second run has digest {again.digest}, the first one {digest}")
