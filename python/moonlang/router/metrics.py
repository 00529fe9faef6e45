"""The metrics of one router, named as those of SGLang's, counted with plain numbers and made up when scraped."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from moonlang.base import clock
from moonlang.observability import buckets
from moonlang.observability.metrics import Distribution
from moonlang.router.workers import KINDS, WorkerSet

_BREAKER = {"closed": 0, "open": 1, "half_open": 2}
FIRST_BYTE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *buckets.TIME_TO_FIRST_TOKEN_S)


class RouterMetrics(Collector):
    """Counts of one router; the state of its workers comes in with each scrape."""

    def __init__(self, workers: WorkerSet) -> None:
        self._workers = workers
        self._requests: Counter[tuple[str, str]] = Counter()  # by route and "streaming"
        self._responses: Counter[str] = Counter()
        self._upstream: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._broken: Counter[str] = Counter()
        self._aborted = 0
        self.active = 0
        self._first_byte_s: defaultdict[str, Distribution] = defaultdict(lambda: Distribution(FIRST_BYTE_S))
        self._whole_s: defaultdict[str, Distribution] = defaultdict(lambda: Distribution(buckets.END_TO_END_S))
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def started(self, route: str, streaming: bool) -> None:
        """A request has been read."""
        self._requests[route, str(streaming).lower()] += 1

    def first_byte(self, route: str, seconds: float) -> None:
        """The first byte of an answer has gone out, so long after the request was read."""
        self._first_byte_s[route].observe(seconds)

    def ended(self, route: str, status: int, seconds: float) -> None:
        """An answer is out."""
        self._responses[str(status)] += 1
        self._whole_s[route].observe(seconds)

    def aborted(self) -> None:
        """A client has left before its answer was out."""
        self._aborted += 1

    def answered(self, status: int) -> None:
        """A worker has answered."""
        self._upstream[str(status)] += 1

    def broken(self, url: str) -> None:
        """A worker has broken off an answer, or has not given one."""
        self._broken[url] += 1

    def retried(self, route: str) -> None:
        self._retries[route] += 1

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry, once at registration and once per scrape."""
        requests = CounterMetricFamily(
            "smg_router_requests_total", "Requests by route.", labels=["endpoint", "streaming"]
        )
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        for name, text, label, counts in (
            ("smg_http_responses_total", "Answers by status.", "status_code", self._responses),
            ("smg_router_upstream_responses_total", "Answers of workers.", "status_code", self._upstream),
            ("smg_router_retries_total", "Further attempts.", "endpoint", self._retries),
            ("smg_worker_errors_total", "Answers that broke off or never began.", "worker", self._broken),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for value, count in counts.items():
                family.add_metric([value], count)
            yield family
        yield CounterMetricFamily("smg_router_aborts_total", "Requests whose client left.", value=self._aborted)
        yield GaugeMetricFamily("smg_http_connections_active", "Requests under way.", value=self.active)
        for name, text, found in (
            ("smg_router_ttft_seconds", "Request to first byte of the answer.", self._first_byte_s),
            ("smg_router_request_duration_seconds", "Request to end of the answer.", self._whole_s),
        ):
            family = HistogramMetricFamily(name, text, labels=["endpoint"])
            for route, distribution in found.items():
                distribution.export(family, [route])
            yield family
        yield from self._worker_families()

    def _worker_families(self) -> Iterator[Metric]:
        now_ns = clock.monotonic_ns()
        pool = GaugeMetricFamily("smg_worker_pool_size", "Workers by type.", labels=["worker_type"])
        for kind in KINDS:
            pool.add_metric([kind], len(self._workers.of(kind)))
        yield pool
        names = ["worker", "worker_type"]
        health = GaugeMetricFamily("smg_worker_health", "1: up.", labels=names)
        active = GaugeMetricFamily("smg_worker_requests_active", "Requests under way.", labels=names)
        breaker = GaugeMetricFamily("smg_worker_cb_state", "0: closed, 1: open, 2: half open.", labels=names)
        known = GaugeMetricFamily("smg_worker_prefix_blocks", "Remembered blocks of prompts.", labels=names)
        chosen = CounterMetricFamily("smg_worker_selection_total", "Times chosen.", labels=names)
        for worker in self._workers:
            labels = [worker.url, worker.kind]
            health.add_metric(labels, worker.up)
            active.add_metric(labels, worker.active)
            breaker.add_metric(labels, _BREAKER[worker.breaker.state(now_ns)])
            known.add_metric(labels, len(worker.index))
            chosen.add_metric(labels, worker.selected_total)
        yield from (health, active, breaker, known, chosen)
