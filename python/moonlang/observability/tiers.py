"""Metrics of the tiers below the device pool, from the scheduler's load report. SGLang's names where it has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

_PER_STORE = (
    ("sglang:prefetched_tokens_total", "Tokens whose KV came from the store.", "total_store_tokens"),
    ("sglang:backuped_tokens_total", "Tokens whose KV went to the store.", "total_saved_tokens"),
    (
        "sglang:hicache_backup_dropped_tokens_total",
        "Gone before they were handed down.",
        "total_dropped_tokens",
    ),
)


def families(load: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Metric]:
    """load: of `loads.report`; nothing for a server without lower tiers."""
    tiers, store = load.get("tiers"), load.get("store")
    if not tiers or store is None:
        return
    names, values = list(labels), list(labels.values())
    for name, text, key in _PER_STORE:
        family = CounterMetricFamily(name, text, labels=[*names, "storage_backend"])
        family.add_metric([*values, store["backend"]], tiers[key])
        yield family
    page = load["page_size"]
    for name, text, value in (
        ("sglang:hicache_host_total_tokens", "Size of the host pool.", tiers["host_slots"] * page),
        ("sglang:hicache_host_used_tokens", "Tokens in the host pool.", tiers["host_used"] * page),
        ("moonlang:tier_fetches", "Prefixes on their way up.", tiers["fetching"]),
        ("moonlang:tier_queued_pages", "Pages on their way down.", tiers["queued_pages"]),
    ):
        gauge = GaugeMetricFamily(name, text, labels=names)
        gauge.add_metric(values, value)
        yield gauge
    hits = CounterMetricFamily("moonlang:tier_hit_tokens_total", "Tokens brought up.", labels=[*names, "tier"])
    hits.add_metric([*values, "host"], tiers["total_host_tokens"])
    hits.add_metric([*values, "storage"], tiers["total_store_tokens"])
    yield hits
    yield from _by("moonlang:tier_misses_total", "Why the store brought nothing.", "reason", tiers["misses"], labels)
    yield from _store_families(store, labels)


def _store_families(store: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Metric]:
    names, values = list(labels), list(labels.values())
    moved = CounterMetricFamily("moonlang:store_bytes_total", "Moved by the store.", labels=[*names, "direction"])
    moved.add_metric([*values, "load"], store["loaded_bytes"])
    moved.add_metric([*values, "save"], store["saved_bytes"])
    yield moved
    for name, text, value in (
        ("moonlang:store_ops_total", "Operations carried out.", store["ops"]),
        ("moonlang:store_busy_seconds_total", "Time spent in them.", store["busy_ns"] / 1e9),
    ):
        family = CounterMetricFamily(name, text, labels=names)
        family.add_metric(values, value)
        yield family
    yield from _by("moonlang:store_failures_total", "Operations that failed.", "cause", store["failures"], labels)


def _by(name: str, text: str, label: str, counts: Mapping[str, int], labels: Mapping[str, str]) -> Iterator[Metric]:
    family = CounterMetricFamily(name, text, labels=[*labels, label])
    for key, count in counts.items():
        family.add_metric([*labels.values(), key], count)
    yield family
