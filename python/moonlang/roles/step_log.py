"""The `Prefill batch` and `Decode batch` lines, whose fields dashboards and scripts of SGLang read."""

from __future__ import annotations

from moonlang.base import log
from moonlang.base.clock import NS_PER_S
from moonlang.scheduler.settings import PlanReport, SchedulerStats

_log = log.get(__name__)

_STALE_NS = 10 * NS_PER_S  # a throughput older than this says nothing about now
_PAUSE_NS = NS_PER_S  # plans further apart than this belong to different busy times
_MOMENT_NS = NS_PER_S // 1000  # plans that are closer are made one after the other and computed later


class StepLog:
    """Counts what plans hold and writes a line per prefill, and per `interval` plans with decode rows."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._plans = 0
        self._tokens = 0
        self._since_ns = 0
        self._plan_ns = 0
        self._prefill_ns = 0
        self._prefill_tokens = 0
        self._prefill_rate = 0.0
        self._rate = 0.0

    def throughput(self, now_ns: int) -> float:
        """Output tokens per second over the last interval; 0 when nothing has run lately."""
        return self._rate if now_ns - self._since_ns < _STALE_NS else 0.0

    def prefill(self, report: PlanReport, stats: SchedulerStats, now_ns: int) -> None:
        """One plan with prompt tokens."""
        self._prefill_tokens += report.new_tokens
        if (elapsed_ns := now_ns - self._prefill_ns) >= _MOMENT_NS:
            self._prefill_rate = self._prefill_tokens * NS_PER_S / elapsed_ns
            self._prefill_tokens, self._prefill_ns = 0, now_ns
        _log.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, #running-req: %d, "
            "#queue-req: %d, #pending-token: %d, cuda graph: False, input throughput (token/s): %.2f",
            report.new_seqs,
            report.new_tokens,
            report.cached_tokens,
            stats.token_usage,
            report.decode_rows,
            stats.num_waiting,
            stats.waiting_tokens,
            self._prefill_rate,
        )

    def decode(self, rows: int, now_ns: int) -> bool:
        """One plan with `rows` decode rows; True when a line is due."""
        if now_ns - self._plan_ns > _PAUSE_NS:  # idle time is no part of a throughput
            self._tokens, self._since_ns = 0, now_ns
        self._plan_ns = now_ns
        self._plans += 1
        self._tokens += rows
        return self._plans % self._interval == 0

    def decode_line(self, stats: SchedulerStats, now_ns: int) -> None:
        """Write the line that is due and start a new interval."""
        self._rate = self._tokens * NS_PER_S / max(1, now_ns - self._since_ns)
        self._tokens, self._since_ns = 0, now_ns
        _log.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, cuda graph: False, "
            "gen throughput (token/s): %.2f, #queue-req: %d",
            stats.num_running,
            stats.used_tokens,
            stats.token_usage,
            self._rate,
            stats.num_waiting,
        )
