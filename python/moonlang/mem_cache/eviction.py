"""Which unlocked leaf goes first: the one with the lowest rank. A rank may only grow while a node lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Ranked(Protocol):
    """What an order may look at."""

    used: int  # tree operation of the last use
    hits: int  # number of uses


EvictionOrder = Callable[[Ranked], tuple[int, ...]]


def lru(node: Ranked) -> tuple[int, ...]:
    """Least recently used first."""
    return (node.used,)


def lfu(node: Ranked) -> tuple[int, ...]:
    """Least often used first, then least recently."""
    return (node.hits, node.used)


ORDERS: dict[str, EvictionOrder] = {"lru": lru, "lfu": lfu}
