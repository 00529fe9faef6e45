"""Histogram buckets of transfers between prefill and decode instances."""

from __future__ import annotations

_MS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 120_000)

BOUNDS: dict[str, tuple[float, ...]] = {
    "kv_transfer_bootstrap_ms": _MS,
    "kv_transfer_alloc_ms": _MS,
    "kv_transfer_latency_ms": _MS,
    "kv_transfer_speed_gb_s": (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 400),
    "kv_transfer_total_mb": (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000),
}
