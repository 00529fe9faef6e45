"""Which worker gets a request. A policy is a function of the usable workers and the request's prefix path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from moonlang.router.workers import Worker

Policy = Callable[[Sequence[Worker], Sequence[bytes]], Worker]

NAMES = ("random", "round_robin", "power_of_two", "cache_aware")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAware:
    """Limits of the policy of that name.

    threshold: the share of a prompt that must be known for its worker to be preferred. Balance comes first: when the
    busiest worker has abs_load requests more than the idlest, and rel_load times as many, the idlest gets the next.
    """

    threshold: float
    abs_load: int
    rel_load: float


def find(name: str, random: Random, cache_aware: CacheAware) -> Policy:
    """The policy `name`, with state of its own where it has any."""
    if name == "random":
        return lambda workers, path: random.choice(workers)
    if name == "round_robin":
        return RoundRobin()
    if name == "power_of_two":
        return lambda workers, path: power_of_two(workers, random)
    return lambda workers, path: most_cached(workers, path, cache_aware)


class RoundRobin:
    """Each in turn. The order is that of their coming; those that come or go change no one's turn."""

    def __init__(self) -> None:
        self._last = 0

    def __call__(self, workers: Sequence[Worker], path: Sequence[bytes]) -> Worker:
        chosen = next((worker for worker in workers if int(worker.id) > self._last), workers[0])
        self._last = int(chosen.id)
        return chosen


def power_of_two(workers: Sequence[Worker], random: Random) -> Worker:
    """The idler one of two drawn by lot: almost as even as the idlest of all, without a herd running to it."""
    drawn = random.sample(workers, min(2, len(workers)))
    return min(drawn, key=lambda worker: worker.active)


def most_cached(workers: Sequence[Worker], path: Sequence[bytes], limits: CacheAware) -> Worker:
    """The worker that has seen most of the prompt, unless that is little or load is uneven; then the idlest.

    Among equally idle ones the one that has seen least of anything: it has the most room in its cache.
    """
    chosen = _by_prefix(workers, path, limits) or min(workers, key=lambda worker: (worker.active, len(worker.index)))
    chosen.index.add(path)
    return chosen


def _by_prefix(workers: Sequence[Worker], path: Sequence[bytes], limits: CacheAware) -> Worker | None:
    loads = [worker.active for worker in workers]
    if max(loads) - min(loads) > limits.abs_load and max(loads) > limits.rel_load * min(loads):
        return None
    known = [worker.index.match(path) for worker in workers]
    longest = max(known)
    if longest == 0 or longest < limits.threshold * len(path):
        return None
    best = [worker for worker, length in zip(workers, known, strict=True) if length == longest]
    return min(best, key=lambda worker: worker.active)
