"""What the scheduler is told once, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from moonlang.core.pairing import KvCard
from moonlang.mem_cache.tier_settings import TierConfig, TierStats

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingConfig:
    """One half of prefill/decode disaggregation. Times in ns.

    card: of this instance. patience_ns: how long a request waits for each answer of its other half, at most until its
    own deadline. fallback: a decode instance prefills by itself when its peer fails.
    """

    mode: Literal["prefill", "decode"]
    card: KvCard
    patience_ns: int = 120_000 * NS_PER_MS
    repeat_ns: int = 200 * NS_PER_MS  # until an unanswered message is said again
    most_early: int = 4096  # Wants kept whose request has not come yet, and rooms known to have failed
    push_groups: int = 8  # a plan's pages leave in so many groups of layers ...
    push_span_bytes: int = 64 << 10  # ... or in fewer, so that what leaves of a page has so many bytes at least ...
    push_least_bytes: int = 4 << 20  # ... if there is so much to send of the plan in all
    push_most_bytes: int = 64 << 20  # in one operation
    verify: bool = True
    fallback: bool = False
    extra_leases: int = 16  # decode: requests beyond max_running that may hold pages already


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes in tokens unless the name says pages. The bounds named here are the only ones the scheduler knows."""

    num_pages: int  # pool size, page 0 included, which is never used
    page_size: int = 1
    context_length: int = 4096
    max_running: int = 256  # slots
    max_queued: int | None = None  # beyond it a request is refused with 503
    chunk_tokens: int | None = 4096  # prompt tokens in one plan; None: prompts are never cut
    max_prefill_tokens: int = 16384  # prompt tokens in one plan when prompts are not cut
    prefill_max_requests: int | None = None  # prompts in one plan
    policy: str = "fcfs"
    eviction: str = "lru"
    radix: bool = True
    depth: int = 2  # plans in flight: 2 is overlap scheduling
    lanes: int = 1  # > 1: stages of a pipeline; plans in flight then never wait for each other's tokens
    lane_rows: int | None = None  # requests in one plan, with lanes
    eos_token_ids: tuple[int, ...] = ()
    conservativeness: float = 1.0
    priority: bool = False  # requests carry priorities, higher first
    priority_low_first: bool = False
    preempt: bool = True
    preempt_gap: int = 10
    prefix_wait_tokens: int = 32  # a shared run of so many tokens is worth waiting for
    reserved_tokens: int = 0  # output tokens to keep memory for, at least, when a request is admitted
    seed: int = 0  # of policy "random"
    pairing: PairingConfig | None = None
    tiers: TierConfig | None = None

    @property
    def may_preempt(self) -> bool:
        return self.priority and self.preempt


class PairStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of a prefill or decode instance; all zero for a server that stands alone. Totals count from the start.

    num_pairing: requests that have not found their other half or wait for pages to receive it. num_moving: whose pages
    are being sent. total_pairing_ns: from arrival to Want, over total_paired requests; total_moving_ns: from Want to
    the last verified page (decode), or from the last computed token to the last page sent (prefill), over total_moved.
    """

    num_pairing: int = 0
    num_moving: int = 0
    num_transfers: int = 0  # operations under way
    quarantined_pages: int = 0
    total_paired: int = 0
    total_pairing_ns: int = 0
    total_moved: int = 0
    total_moving_ns: int = 0
    total_moved_bytes: int = 0
    total_failed: int = 0
    total_fallbacks: int = 0


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot for metrics and load reports. Totals count from the start of the process."""

    num_running: int
    num_waiting: int
    num_grammar: int
    num_pages: int
    page_size: int
    used_tokens: int  # in pages of running requests
    cached_tokens: int  # in pages that only the tree holds, evictable
    free_tokens: int
    max_total_tokens: int
    waiting_tokens: int  # prompt tokens of the queue
    new_token_ratio: float
    total_requests: int
    total_finished: int
    total_aborted: int
    total_prompt_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    total_retractions: int
    total_plans: int
    pairs: PairStats = PairStats()
    tiers: TierStats = TierStats()

    @property
    def token_usage(self) -> float:
        """Share of the pool held by running requests, 0 .. 1."""
        return self.used_tokens / self.max_total_tokens

    @property
    def cache_hit_rate(self) -> float:
        """Prompt tokens found in the cache over all prompt tokens admitted, since start."""
        return self.total_cached_tokens / max(1, self.total_prompt_tokens)


@dataclass(slots=True)
class Totals:
    """Counters that only grow."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    retractions: int = 0
    plans: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What the newest plan holds, for the log. new_seqs: admissions; new_tokens: prompt tokens to compute;
    cached_tokens: prompt tokens of the admissions that were found in the cache."""

    new_seqs: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    decode_rows: int = 0
