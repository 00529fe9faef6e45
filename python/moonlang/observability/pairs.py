"""The metrics of a prefill or decode instance: SGLang's names for its queues and transfers, and a few of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from moonlang.observability.distribution import Distribution
from moonlang.observability.pair_bounds import BOUNDS

# (metric name, key of the scheduler's report of its pairs), by mode
GAUGES = {
    "prefill": (
        ("sglang:num_prefill_bootstrap_queue_reqs", "num_pairing"),
        ("sglang:num_prefill_inflight_queue_reqs", "num_moving"),
    ),
    "decode": (
        ("sglang:num_decode_prealloc_queue_reqs", "num_pairing"),
        ("sglang:num_decode_transfer_queue_reqs", "num_moving"),
        ("moonlang:kv_quarantined_pages", "quarantined_pages"),
    ),
}
COUNTERS = (
    ("sglang:num_bootstrap_failed_reqs_total", "bootstrap_failed"),
    ("sglang:num_transfer_failed_reqs_total", "transfer_failed"),
    ("moonlang:kv_transfer_bytes_total", "total_moved_bytes"),
    ("moonlang:kv_transfer_requests_total", "total_moved"),
    ("moonlang:pd_fallback_requests_total", "total_fallbacks"),
)


def families(labels: Mapping[str, str], mode: str, pairs: Mapping[str, Any]) -> Iterator[Metric]:
    """pairs: what the scheduler role reports of its pairs; `distributions` in it by name of the histogram."""
    names, values = list(labels), list(labels.values())
    for name, key in GAUGES.get(mode, ()):
        gauge = GaugeMetricFamily(name, f"Pairs: {key}.", labels=names)
        gauge.add_metric(values, float(pairs[key]))
        yield gauge
    for name, key in COUNTERS:
        counter = CounterMetricFamily(name, f"Pairs: {key}.", labels=names)
        counter.add_metric(values, float(pairs[key]))
        yield counter
    for name, found in pairs["distributions"].items():
        histogram = HistogramMetricFamily(f"sglang:{name}", "Transfers of KV pages.", labels=names)
        Distribution(BOUNDS[name], found["counts"], found["total"]).export(histogram, values)
        yield histogram
