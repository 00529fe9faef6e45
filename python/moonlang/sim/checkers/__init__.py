"""What must hold, one property a file. `fresh()` gives a run its own set of checkers."""

from __future__ import annotations

from moonlang.sim.checkers.books import Books
from moonlang.sim.checkers.bounds import Bounds
from moonlang.sim.checkers.delivery import Delivery
from moonlang.sim.checkers.isolation import Isolation
from moonlang.sim.checkers.liveness import Liveness
from moonlang.sim.checkers.order import Order
from moonlang.sim.checkers.pages import Pages
from moonlang.sim.checkers.radix import Radix
from moonlang.sim.stage import Checker
from moonlang.sim.world import World


def fresh() -> list[Checker[World]]:
    """All checkers, without memory of another run. Replay equality needs two runs: see `replay`."""
    return [Delivery(), Radix(), Pages(), Isolation(), Bounds(), Order(), Liveness(), Books()]
