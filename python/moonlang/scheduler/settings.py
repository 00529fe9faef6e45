"""What the scheduler is told once, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


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
    eos_token_ids: tuple[int, ...] = ()
    conservativeness: float = 1.0
    priority: bool = False  # requests carry priorities, higher first
    priority_low_first: bool = False
    preempt: bool = True
    preempt_gap: int = 10
    prefix_wait_tokens: int = 32  # a shared run of so many tokens is worth waiting for
    seed: int = 0  # of policy "random"

    @property
    def may_preempt(self) -> bool:
        return self.priority and self.preempt


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
