"""The one place that looks into a Scheduler's private parts: checkers must see what no user may touch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moonlang.core.lease import Lease, PrefixRef
from moonlang.core.request import Request
from moonlang.mem_cache.none import NoCache
from moonlang.mem_cache.pool import PagePool
from moonlang.mem_cache.radix import RadixCache
from moonlang.scheduler.decode_side import DecodeSide
from moonlang.scheduler.scheduler import Scheduler


def pool(scheduler: Scheduler) -> PagePool:
    """The page ledger."""
    return scheduler._roster.memory.pool


def owners(scheduler: Scheduler) -> Sequence[int]:
    """The `Owner` of each page, as a plain integer: much faster than asking page by page."""
    return scheduler._roster.memory.pool._owner


def cache(scheduler: Scheduler) -> RadixCache | NoCache:
    """The prefix tree."""
    return scheduler._roster.memory.cache


def running(scheduler: Scheduler) -> list[Request]:
    """Requests with a slot and a lease, in order of admission."""
    return list(scheduler._roster.running.values())


def waiting(scheduler: Scheduler) -> list[Request]:
    """Requests in the queue, in no particular order."""
    return list(scheduler._roster.waiting)


def requests(scheduler: Scheduler) -> list[Request]:
    """All requests that have not ended."""
    return list(scheduler._requests.values())


def leases(scheduler: Scheduler) -> list[Lease]:
    """All leases: of requests with and without a slot, and of none."""
    roster = scheduler._roster
    held = [request.lease for request in (*roster.running.values(), *roster.arriving.values())]
    fetching = scheduler.tiers.leases if scheduler.tiers is not None else []
    return [lease for lease in held if lease is not None] + scheduler.peers.leases + fetching


def locks(scheduler: Scheduler) -> list[PrefixRef]:
    """Every lock on the prefix tree: one per lease, and those of pages that are on their way down."""
    going = scheduler.tiers.locks if scheduler.tiers is not None else []
    return [lease.prefix for lease in leases(scheduler)] + going


def is_moving(scheduler: Scheduler) -> bool:
    """Whether pages are on their way between tiers."""
    return scheduler._roster.is_moving


def is_fetching(scheduler: Scheduler, request: Request, now_ns: int) -> bool:
    """Whether it waits for what a lower tier has."""
    return scheduler._roster.is_fetching(request, now_ns)


def waits_for(scheduler: Scheduler, instance: str) -> bool:
    """Whether a decode instance expects anything but the end of a room from this peer."""
    pairing = scheduler.config.pairing
    if pairing is None or pairing.mode != "decode":
        return False
    rooms = cast(DecodeSide, scheduler.peers)._rooms.values()
    return any(room.card is not None and room.card.instance == instance for room in rooms)


def num_grammar(scheduler: Scheduler) -> int:
    """Requests that wait for their grammar."""
    return scheduler.stats().num_grammar
