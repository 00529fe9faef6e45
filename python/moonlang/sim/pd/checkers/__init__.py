"""What must hold between servers and for each of them, one property a file."""

from __future__ import annotations

from moonlang.sim.checkers.bounds import Bounds
from moonlang.sim.checkers.delivery import Delivery
from moonlang.sim.checkers.order import Order
from moonlang.sim.checkers.pages import Pages
from moonlang.sim.checkers.radix import Radix
from moonlang.sim.pd.checkers.grants import Grants
from moonlang.sim.pd.checkers.keys import Keys
from moonlang.sim.pd.checkers.partings import Partings
from moonlang.sim.pd.checkers.progress import Progress
from moonlang.sim.pd.checkers.waits import Waits
from moonlang.sim.pd.checkers.weights import Weights
from moonlang.sim.pd.world import Watchers
from moonlang.sim.stage import Checker, Stage


def fresh() -> Watchers:
    """All checkers, without memory of another run."""
    return Watchers(server=_server, pairs=(Grants(), Keys(), Weights(), Partings()), clients=(Delivery(), Waits()))


def _server() -> list[Checker[Stage]]:
    return [Radix(), Pages(), Bounds(), Order(), Progress()]
