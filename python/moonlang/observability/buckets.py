"""Histogram buckets: SGLang's defaults and the flags that replace them."""

from __future__ import annotations

from collections.abc import Sequence

TIME_TO_FIRST_TOKEN_S = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
INTER_TOKEN_S = (
    *(0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080, 0.100),
    *(0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8),
)
END_TO_END_S = (*TIME_TO_FIRST_TOKEN_S, 600, 1200, 1800, 2400)
QUEUE_S = (
    *(0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80),
    *(90, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1200, 1400, 1600, 1800, 2000, 2200, 2400, 2600, 2800),
    3000,
)
TOKENS = (
    *(100, 300, 500, 700, 1000, 1500, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000, 10_000, 12_000, 15_000),
    *(20_000, 22_000, 25_000, 30_000, 35_000, 40_000, 66_000, 99_000, 132_000, 300_000, 600_000, 900_000, 1_100_000),
)


def seconds(flag: Sequence[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    """The buckets of a --bucket-... flag, ascending."""
    return tuple(sorted(set(flag))) if flag else default
