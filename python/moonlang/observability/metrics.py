"""The `sglang:` metrics of one server, counted with plain numbers and turned into Prometheus families when scraped.

Nothing here is global: each server owns a ServerMetrics with its own registry. An observation costs a bisect and an
addition, because some are made per token; a Prometheus client object would take a lock and a label look-up each time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from moonlang.observability import buckets, experts, pairs, tiers
from moonlang.observability.distribution import Distribution

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _ByStreaming:
    """One distribution for streaming requests and one for the others."""

    __slots__ = ("sides",)

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.sides = (Distribution(bounds), Distribution(bounds))

    def observe(self, streaming: bool, value: float, times: int = 1) -> None:
        self.sides[streaming].observe(value, times)


class ServerMetrics(Collector):
    """Metrics of one server as the API process sees them; the scheduler's gauges come in with each scrape.

    model_name and extra: constant labels. replicas: with more than one, what each scheduler says has a label dp_rank.
    process: with what the operating system knows of this process. The bounds are ascending bucket limits, in seconds or
    tokens.
    """

    def __init__(
        self,
        model_name: str,
        *,
        engine_type: str = "unified",
        extra: Mapping[str, str] | None = None,
        replicas: int = 1,
        ttft_s: tuple[float, ...] = buckets.TIME_TO_FIRST_TOKEN_S,
        inter_token_s: tuple[float, ...] = buckets.INTER_TOKEN_S,
        e2e_s: tuple[float, ...] = buckets.END_TO_END_S,
        prompt_tokens: tuple[float, ...] = buckets.TOKENS,
        generation_tokens: tuple[float, ...] = buckets.TOKENS,
        process: bool = True,
    ) -> None:
        self._empty = partial(
            ServerMetrics,
            model_name,
            engine_type=engine_type,
            extra=extra,
            replicas=replicas,
            ttft_s=ttft_s,
            inter_token_s=inter_token_s,
            e2e_s=e2e_s,
            prompt_tokens=prompt_tokens,
            generation_tokens=generation_tokens,
            process=False,
        )
        self._labels = {"engine_type": engine_type, "model_name": model_name, **(extra or {})}
        self.time_to_first_token_s = _ByStreaming(ttft_s)
        self.time_per_output_token_s = _ByStreaming(inter_token_s)
        self.e2e_s = _ByStreaming(e2e_s)
        self.inter_token_s = Distribution(inter_token_s)
        self.queue_s = [Distribution(buckets.QUEUE_S) for _ in range(replicas)]
        self.prompt_tokens = Distribution(prompt_tokens)
        self.uncached_prompt_tokens = Distribution(prompt_tokens)
        self.generation_tokens = Distribution(generation_tokens)
        self._requests = [0, 0]  # by streaming, as the next two
        self._prompt_total = [0, 0]
        self._generation_total = [0, 0]
        self._cached_total = [0]
        self._aborted_total = [0]
        self._grammar_total = [0]
        self._http_requests: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._http_active: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._http_responses: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._loads: Sequence[Mapping[str, Any]] = ()
        self.lost_ranks = 0  # that the server goes on without
        self._registry = CollectorRegistry()
        self._registry.register(self)
        if process:
            ProcessCollector(registry=self._registry)

    def started(self, streaming: bool, grammar: bool) -> None:
        """A request was sent to the scheduler."""
        self._requests[streaming] += 1
        self._grammar_total[0] += grammar

    def ended(self, streaming: bool, *, prompt: int, cached: int, output: int, e2e_s: float, decode_s: float) -> None:
        """A request finished by itself. Tokens, and seconds from arrival and from the first token to the last."""
        self._prompt_total[streaming] += prompt
        self._generation_total[streaming] += output
        self._cached_total[0] += cached
        self.prompt_tokens.observe(prompt)
        self.uncached_prompt_tokens.observe(prompt - cached)
        self.generation_tokens.observe(output)
        self.e2e_s.observe(streaming, e2e_s)
        if output > 1:
            self.time_per_output_token_s.observe(streaming, decode_s / (output - 1))

    def aborted(self) -> None:
        """A request was refused by the engine, or its client went away."""
        self._aborted_total[0] += 1

    def http_started(self, endpoint: str, method: str) -> None:
        self._http_requests[endpoint, method] += 1
        self._http_active[endpoint, method] += 1

    def http_ended(self, endpoint: str, method: str, status: int) -> None:
        self._http_active[endpoint, method] -= 1
        self._http_responses[endpoint, str(status), method] += 1

    def render(self, loads: Sequence[Mapping[str, Any]], elsewhere: Sequence[Mapping[str, Any]] = ()) -> bytes:
        """The exposition text. loads: of each scheduler, by the names used in `_scheduler_families`; () if unknown.
        elsewhere: the `numbers` of other processes of this server; then only what concerns all is said."""
        if elsewhere:
            whole = self._empty()
            whole.lost_ranks = self.lost_ranks
            for numbers in (self.numbers(), *elsewhere):
                whole._add(numbers)
            return whole.render(loads)
        self._loads = loads
        return generate_latest(self._registry)

    def numbers(self) -> dict[str, Any]:
        """All that has been counted, as plain values for another process of this server."""
        return {
            "distributions": [[one.counts, one.total] for one in self._distributions()],
            "totals": self._totals(),
            "http": [[[*labels, count] for labels, count in table.items()] for table in self._http()],
        }

    def _add(self, numbers: Mapping[str, Any]) -> None:
        """Count what another process has counted."""
        for one, (counts, total) in zip(self._distributions(), numbers["distributions"], strict=True):
            one.counts = [mine + theirs for mine, theirs in zip(one.counts, counts, strict=True)]
            one.total += total
        for mine, theirs in zip(self._totals(), numbers["totals"], strict=True):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        for table, rows in zip(self._http(), numbers["http"], strict=True):
            for *labels, count in rows:
                table[tuple(labels)] += count

    def _distributions(self) -> list[Distribution]:
        by_streaming = (self.time_to_first_token_s, self.time_per_output_token_s, self.e2e_s)
        tokens = (self.prompt_tokens, self.uncached_prompt_tokens, self.generation_tokens)
        return [*(side for pair in by_streaming for side in pair.sides), self.inter_token_s, *self.queue_s, *tokens]

    def _totals(self) -> list[list[int]]:
        counted = (self._requests, self._prompt_total, self._generation_total)
        return [*counted, self._cached_total, self._aborted_total, self._grammar_total]

    def _http(self) -> tuple[defaultdict[Any, int], ...]:
        return self._http_requests, self._http_active, self._http_responses

    def collect(self) -> Iterator[Metric]:
        """Called by the registry, once at registration and once per scrape."""
        yield from self._request_families()
        yield from self._http_families()
        lost = GaugeMetricFamily("moonlang:lost_ranks", "Ranks that ended.", labels=list(self._labels))
        lost.add_metric(list(self._labels.values()), self.lost_ranks)
        yield lost
        replicas = len(self.queue_s)
        loads: Sequence[Mapping[str, Any]] = self._loads or [{}] * replicas
        yield from joined(self._scheduler_families(number, loads[number]) for number in range(replicas))

    def _request_families(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        by_streaming = (
            ("num_requests_total", "Requests sent to the scheduler.", self._requests),
            ("prompt_tokens_total", "Prompt tokens of finished requests.", self._prompt_total),
            ("generation_tokens_total", "Output tokens of finished requests.", self._generation_total),
        )
        for name, text, counts in by_streaming:
            family = CounterMetricFamily(f"sglang:{name}", text, labels=[*names, "is_streaming"])
            for streaming in (False, True):
                family.add_metric([*values, str(streaming)], counts[streaming])
            yield family
        cached = CounterMetricFamily(
            "sglang:cached_tokens_total", "Prompt tokens found in the cache.", labels=[*names, "cache_source"]
        )
        cached.add_metric([*values, "device"], self._cached_total[0])
        yield cached
        for name, text, count in (
            ("num_aborted_requests_total", "Requests refused or aborted.", self._aborted_total),
            ("num_so_requests_total", "Requests with a grammar.", self._grammar_total),
        ):
            family = CounterMetricFamily(f"sglang:{name}", text, labels=names)
            family.add_metric(values, count[0])
            yield family
        yield from self._request_histograms(names, values)

    def _request_histograms(self, names: list[str], values: list[str]) -> Iterator[Metric]:
        for name, text, pair in (
            ("time_to_first_token_seconds", "Arrival to first token.", self.time_to_first_token_s),
            ("e2e_request_latency_seconds", "Arrival to end.", self.e2e_s),
            ("request_time_per_output_token_seconds", "Mean gap of a request.", self.time_per_output_token_s),
        ):
            family = HistogramMetricFamily(f"sglang:{name}", text, labels=[*names, "is_streaming"])
            for streaming in (False, True):
                pair.sides[streaming].export(family, [*values, str(streaming)])
            yield family
        for name, text, one in (
            ("inter_token_latency_seconds", "Gap between tokens.", self.inter_token_s),
            ("prompt_tokens_histogram", "Prompt tokens per request.", self.prompt_tokens),
            ("uncached_prompt_tokens_histogram", "Prompt tokens not in the cache.", self.uncached_prompt_tokens),
            ("generation_tokens_histogram", "Output tokens per request.", self.generation_tokens),
        ):
            family = HistogramMetricFamily(f"sglang:{name}", text, labels=names)
            one.export(family, values)
            yield family

    def _http_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("sglang:http_requests_total", "HTTP requests.", labels=["endpoint", "method"])
        for labels, count in self._http_requests.items():
            requests.add_metric(labels, count)
        active = GaugeMetricFamily(
            "sglang:http_requests_active", "HTTP requests being served.", labels=["endpoint", "method"]
        )
        for labels, count in self._http_active.items():
            active.add_metric(labels, count)
        responses = CounterMetricFamily(
            "sglang:http_responses_total", "HTTP responses.", labels=["endpoint", "status_code", "method"]
        )
        for labels, count in self._http_responses.items():
            responses.add_metric(labels, count)
        yield from (requests, active, responses)

    def _scheduler_families(self, replica: int, load: Mapping[str, Any]) -> Iterator[Metric]:
        labels = {**self._labels, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
        if len(self.queue_s) > 1:
            labels["dp_rank"] = str(replica)
        names, values = list(labels), list(labels.values())
        queue = HistogramMetricFamily("sglang:queue_time_seconds", "Time spent waiting for admission.", labels=names)
        self.queue_s[replica].export(queue, values)
        yield queue
        for kind, name, key in SCHEDULER_METRICS:
            if key in load:
                family = kind(f"sglang:{name}", f"Scheduler: {key}.", labels=names)
                family.add_metric(values, float(load[key]))
                yield family
        tokens = CounterMetricFamily(
            "sglang:realtime_tokens_total", "Tokens processed so far.", labels=[*names, "mode"]
        )
        for mode, key in REALTIME_TOKENS:
            if key in load:
                tokens.add_metric([*values, mode], float(load[key]))
        yield tokens
        if "distributions" in load.get("pairs", {}):
            yield from pairs.families(labels, self._labels["engine_type"], load["pairs"])
        yield from experts.families(load, labels)
        yield from tiers.families(
            load, {**self._labels, "dp_rank": labels["dp_rank"]} if "dp_rank" in labels else self._labels
        )


def joined(parts: Iterable[Iterable[Metric]]) -> Iterator[Metric]:
    """Families of several sources, those of one name as one: a name may stand in the exposition only once."""
    found: dict[str, Metric] = {}
    for family in itertools.chain.from_iterable(parts):
        first = found.setdefault(family.name, family)
        if first is not family:
            first.samples.extend(family.samples)
    yield from found.values()


# (family, metric name, key of the scheduler's load report)
SCHEDULER_METRICS: tuple[tuple[type[GaugeMetricFamily] | type[CounterMetricFamily], str, str], ...] = (
    (GaugeMetricFamily, "num_running_reqs", "num_running"),
    (GaugeMetricFamily, "num_queue_reqs", "num_waiting"),
    (GaugeMetricFamily, "num_grammar_queue_reqs", "num_grammar"),
    (GaugeMetricFamily, "gen_throughput", "gen_throughput"),
    (GaugeMetricFamily, "cache_hit_rate", "cache_hit_rate"),
    (GaugeMetricFamily, "token_usage", "token_usage"),
    (GaugeMetricFamily, "full_token_usage", "token_usage"),
    (GaugeMetricFamily, "num_used_tokens", "used_tokens"),
    (GaugeMetricFamily, "kv_used_tokens", "used_tokens"),
    (GaugeMetricFamily, "kv_available_tokens", "free_tokens"),
    (GaugeMetricFamily, "kv_evictable_tokens", "cached_tokens"),
    (GaugeMetricFamily, "max_total_num_tokens", "max_total_tokens"),
    (GaugeMetricFamily, "page_size", "page_size"),
    (GaugeMetricFamily, "num_pages", "num_pages"),
    (GaugeMetricFamily, "context_len", "context_length"),
    (GaugeMetricFamily, "new_token_ratio", "new_token_ratio"),
    (CounterMetricFamily, "num_retracted_requests_total", "total_retractions"),
)
REALTIME_TOKENS = (
    ("prefill_compute", "total_uncached_tokens"),
    ("prefill_cache", "total_cached_tokens"),
    ("decode", "total_output_tokens"),
)
