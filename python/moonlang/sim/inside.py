"""The one place that looks into a Scheduler's private parts: checkers must see what no user may touch."""

from __future__ import annotations

from collections.abc import Sequence

from moonlang.core.request import Request
from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.pool import PagePool
from moonlang.mem_cache.radix import RadixCache
from moonlang.scheduler.scheduler import Scheduler


def pool(scheduler: Scheduler) -> PagePool:
    """The page ledger."""
    return scheduler._memory.pool


def owners(scheduler: Scheduler) -> Sequence[int]:
    """The `Owner` of each page, as a plain integer: much faster than asking page by page."""
    return scheduler._memory.pool._owner


def cache(scheduler: Scheduler) -> RadixCache | NoCache:
    """The prefix tree."""
    return scheduler._memory.cache


def running(scheduler: Scheduler) -> list[Request]:
    """Requests with a slot and a lease, in order of admission."""
    return list(scheduler._running.values())


def waiting(scheduler: Scheduler) -> list[Request]:
    """Requests in the queue, in no particular order."""
    return list(scheduler._waiting)


def num_grammar(scheduler: Scheduler) -> int:
    """Requests that wait for their grammar."""
    return scheduler.stats().num_grammar
