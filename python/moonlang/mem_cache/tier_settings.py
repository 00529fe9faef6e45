"""Bounds and policies of the lower tiers, and what they have done."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """Bounds and policies; times in nanoseconds. host_slots 0: no host tier."""

    host_slots: int = 0
    store: bool = False
    write_policy: str = "write_through"  # write_through_selective: at the second use; write_back: when room gets short
    prefetch_policy: str = "timeout"  # best_effort: never wait for the store; wait_complete: until it has answered
    threshold_tokens: int = 256  # the store is not asked for fewer
    timeout_ns: int = 1_000_000_000
    timeout_ki_token_ns: int = 250_000_000
    batch_pages: int = 64


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; all zero without lower tiers. Totals count from the start of the process, in tokens.

    misses: how often the store brought nothing, by reason. waits: how often a fetch found no room at once. dropped: not
    handed down, because there was no room before they went.
    """

    host_slots: int = 0
    host_used: int = 0
    fetching: int = 0
    queued_pages: int = 0
    total_waits: int = 0
    total_host_tokens: int = 0
    total_store_tokens: int = 0
    total_demoted_tokens: int = 0
    total_saved_tokens: int = 0
    total_dropped_tokens: int = 0
    misses: dict[str, int] = {}


@dataclass(slots=True)
class TierTotals:
    """Counters that only grow, in tokens: what came from where, and why the store brought nothing."""

    host_tokens: int = 0
    store_tokens: int = 0
    saved_tokens: int = 0
    demoted_tokens: int = 0
    waits: int = 0
    misses: dict[str, int] = field(default_factory=dict)  # by reason

    def miss(self, reason: str) -> None:
        self.misses[reason] = self.misses.get(reason, 0) + 1
