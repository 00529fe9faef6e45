"""The latency figures that the page at /ui shows, whether or not a server keeps metrics."""

from __future__ import annotations

from typing import Any

from moonlang.observability.distribution import Distribution

# 1-2-5 steps from 0.1 ms to 100 s: SGLang's own buckets begin where small models have long answered.
BOUNDS_S = tuple(step * 10.0**power for power in range(-4, 3) for step in (1, 2, 5))[:-2]


class Figures:
    """Counts since somebody began to look. Times in seconds."""

    def __init__(self) -> None:
        self.time_to_first_token_s = Distribution(BOUNDS_S)
        self.inter_token_s = Distribution(BOUNDS_S)
        self.queue_s = Distribution(BOUNDS_S)
        self.e2e_s = Distribution(BOUNDS_S)

    def report(self) -> dict[str, Any]:
        """Counts per bucket (the last one is open) and sums, by name."""
        shown = {
            "ttft_s": self.time_to_first_token_s,
            "itl_s": self.inter_token_s,
            "queue_s": self.queue_s,
            "e2e_s": self.e2e_s,
        }
        return {name: {"counts": found.counts.copy(), "total": found.total} for name, found in shown.items()}
