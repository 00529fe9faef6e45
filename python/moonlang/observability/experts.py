"""Metrics of experts that are balanced, from the scheduler's load report. SGLang's names where it has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from moonlang.observability.distribution import Distribution


def families(load: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Metric]:
    """load: of `loads.report`; nothing for a server that balances no experts."""
    found = load.get("experts")
    if not found:
        return
    names, values = list(labels), list(labels.values())
    text = "Mean load of the ranks over the highest, between two looks."
    balancedness = SummaryMetricFamily("sglang:eplb_balancedness", text, labels=[*names, "forward_mode"])
    balancedness.add_metric([*values, "all"], found["looks"], found["before_sum"])
    yield balancedness
    text = "Tokens that a rank had for experts of a layer, between two looks."
    counts = HistogramMetricFamily("sglang:eplb_gpu_physical_count", text, labels=[*names, "layer"])
    for layer, (rank_counts, total) in enumerate(zip(found["rank_counts"], found["rank_sums"], strict=True)):
        Distribution(found["bounds"], rank_counts, total).export(counts, [*values, str(layer)])
    yield counts
    for name, text, key in (
        ("moonlang:eplb_rebalances_total", "Times that experts were placed anew.", "rebalances"),
        ("moonlang:eplb_moved_experts_total", "Slots that got another expert, on all ranks.", "moved"),
    ):
        counter = CounterMetricFamily(name, text, labels=names)
        counter.add_metric(values, found[key])
        yield counter
    for name, text, key in (
        ("moonlang:eplb_balancedness_before", "Of the load looked at last, as it was.", "before"),
        ("moonlang:eplb_balancedness_after", "The same, with what came of the look.", "after"),
    ):
        gauge = GaugeMetricFamily(name, text, labels=names)
        gauge.add_metric(values, found[key])
        yield gauge
