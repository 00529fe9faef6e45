"""Counts of values per bucket, for histograms."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol


class Family(Protocol):
    """A histogram family of prometheus_client."""

    def add_metric(self, labels: Sequence[str], buckets: Sequence[tuple[str, float]], sum_value: float) -> Any: ...


class Distribution:
    """Counts of values per bucket, and their sum. bounds: ascending upper limits; what lies above has a bucket too."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), total: float = 0.0) -> None:
        """counts, total: of a distribution elsewhere."""
        self._bounds = tuple(bounds)
        self.counts = list(counts) or [0] * (len(bounds) + 1)
        self.total = total

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times

    def export(self, family: Family, labels: Sequence[str]) -> None:
        """Add this distribution to a family, with cumulative counts as Prometheus wants them."""
        reached = 0
        found: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self.counts, strict=True):
            reached += count
            found.append(("+Inf" if bound == float("inf") else str(float(bound)), reached))
        family.add_metric(labels, found, self.total)
