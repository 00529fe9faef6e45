"""Metrics: names, types, labels and buckets as SGLang's dashboards read them."""

from __future__ import annotations

import re

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moonlang.moe.eplb import Totals
from moonlang.observability import buckets
from moonlang.observability.metrics import Distribution, ServerMetrics

LOADS = {"num_running": 3, "num_waiting": 1, "token_usage": 0.25, "cache_hit_rate": 0.5, "total_retractions": 2}


def scrape(metrics: ServerMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.render([LOADS]).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    found = [v for (n, pairs), v in scrape(metrics).items() if n == name and labels.items() <= dict(pairs).items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_a_finished_request_is_counted_once_in_every_place() -> None:
    metrics = ServerMetrics("m")
    metrics.started(True, grammar=True)
    metrics.time_to_first_token_s.observe(True, 0.15)
    metrics.inter_token_s.observe(0.003, 4)
    metrics.ended(True, prompt=120, cached=20, output=5, e2e_s=0.5, decode_s=0.04)
    assert value(metrics, "sglang:num_requests_total", is_streaming="True", model_name="m") == 1
    assert value(metrics, "sglang:num_so_requests_total") == 1
    assert value(metrics, "sglang:prompt_tokens_total", is_streaming="True") == 120
    assert value(metrics, "sglang:prompt_tokens_total", is_streaming="False") == 0
    assert value(metrics, "sglang:generation_tokens_total", is_streaming="True") == 5
    assert value(metrics, "sglang:cached_tokens_total", cache_source="device") == 20
    assert value(metrics, "sglang:time_to_first_token_seconds_count", is_streaming="True") == 1
    assert value(metrics, "sglang:time_to_first_token_seconds_bucket", is_streaming="True", le="0.1") == 0
    assert value(metrics, "sglang:time_to_first_token_seconds_bucket", is_streaming="True", le="0.2") == 1
    assert value(metrics, "sglang:inter_token_latency_seconds_count") == 4
    assert value(metrics, "sglang:inter_token_latency_seconds_sum") == pytest.approx(0.012)
    assert value(metrics, "sglang:e2e_request_latency_seconds_sum", is_streaming="True") == 0.5
    assert value(metrics, "sglang:request_time_per_output_token_seconds_sum", is_streaming="True") == pytest.approx(
        0.01
    )
    assert value(metrics, "sglang:uncached_prompt_tokens_histogram_bucket", le="100.0") == 1


def test_balanced_experts() -> None:
    totals = Totals.of(2)
    totals.look(0.25, [[3.0, 1.0], [0.0, 900.0]])
    totals.look(0.75, [[2.0, 2.0], [100.0, 0.0]])
    totals.rebalances, totals.moved = 1, 6
    text = ServerMetrics("m").render([LOADS | {"experts": totals.report()}]).decode()
    for line in (
        'sglang:eplb_balancedness_sum{.*forward_mode="all".*} 1.0',
        "sglang:eplb_balancedness_count{.*} 2.0",
        'sglang:eplb_gpu_physical_count_sum{.*layer="1".*} 1000.0',
        'sglang:eplb_gpu_physical_count_bucket{.*layer="0",le="1.0".*} 1.0',
        'sglang:eplb_gpu_physical_count_bucket{.*layer="0",le="4.0".*} 4.0',
        "moonlang:eplb_rebalances_total{.*} 1.0",
        "moonlang:eplb_moved_experts_total{.*} 6.0",
        "moonlang:eplb_balancedness_before{.*} 0.75",
    ):
        assert re.search(line, text), f"{line}\n{text}"


def test_gauges_come_from_the_scheduler() -> None:
    metrics = ServerMetrics("m", extra={"zone": "a"})
    assert value(metrics, "sglang:num_running_reqs", tp_rank="0", zone="a", engine_type="unified") == 3
    assert value(metrics, "sglang:num_queue_reqs") == 1
    assert value(metrics, "sglang:token_usage") == 0.25
    assert value(metrics, "sglang:num_retracted_requests_total") == 2
    assert not [name for name, _ in scrape(metrics) if name == "sglang:page_size"]  # not reported, so not invented


def test_http_counts() -> None:
    metrics = ServerMetrics("m")
    metrics.http_started("/generate", "POST")
    assert value(metrics, "sglang:http_requests_active", endpoint="/generate", method="POST") == 1
    metrics.http_ended("/generate", "POST", 400)
    assert value(metrics, "sglang:http_requests_active", endpoint="/generate") == 0
    assert value(metrics, "sglang:http_requests_total", endpoint="/generate", method="POST") == 1
    assert value(metrics, "sglang:http_responses_total", status_code="400") == 1


def test_two_servers_do_not_share_anything() -> None:
    first, second = ServerMetrics("a"), ServerMetrics("b")
    first.aborted()
    assert value(first, "sglang:num_aborted_requests_total") == 1
    assert value(second, "sglang:num_aborted_requests_total") == 0


def test_a_value_on_a_bound_belongs_to_it_and_a_large_one_to_infinity() -> None:
    distribution = Distribution((1.0, 2.0))
    for observed in (1.0, 2.0, 3.0):
        distribution.observe(observed)
    assert distribution.counts == [1, 1, 1]


def test_bucket_flags_are_sorted() -> None:
    assert buckets.seconds((2.0, 0.5, 2.0), buckets.END_TO_END_S) == (0.5, 2.0)
    assert buckets.seconds(None, buckets.END_TO_END_S) == buckets.END_TO_END_S
    assert buckets.TIME_TO_FIRST_TOKEN_S[-1] == 400
    assert buckets.END_TO_END_S[-1] == 2400


def test_what_other_processes_have_counted_is_added() -> None:
    first, second = ServerMetrics("m", replicas=2), ServerMetrics("m", replicas=2)
    for metrics, streaming in ((first, True), (second, True), (second, False)):
        metrics.started(streaming, grammar=streaming)
        metrics.time_to_first_token_s.observe(streaming, 0.15)
        metrics.queue_s[1].observe(0.5)
        metrics.ended(streaming, prompt=120, cached=20, output=5, e2e_s=0.5, decode_s=0.04)
        metrics.http_started("/generate", "POST")
    second.http_ended("/generate", "POST", 200)
    second.aborted()
    before = first.numbers()
    text = first.render([], [msgspec.json.decode(msgspec.json.encode(second.numbers()))]).decode()
    found = {
        (sample.name, sample.labels.get("is_streaming", ""), sample.labels.get("dp_rank", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }
    assert found["sglang:num_requests_total", "True", ""] == 2
    assert found["sglang:num_requests_total", "False", ""] == 1
    assert found["sglang:num_so_requests_total", "", ""] == 2
    assert found["sglang:num_aborted_requests_total", "", ""] == 1
    assert found["sglang:prompt_tokens_total", "True", ""] == 240
    assert found["sglang:cached_tokens_total", "", ""] == 60
    assert found["sglang:time_to_first_token_seconds_count", "True", ""] == 2
    assert found["sglang:queue_time_seconds_count", "", "1"] == 3
    assert found["sglang:queue_time_seconds_count", "", "0"] == 0
    assert found["sglang:http_requests_total", "", ""] == 3
    assert found["sglang:http_requests_active", "", ""] == 2
    assert not [name for name, *_ in found if name.startswith("process_")]
    assert first.numbers() == before
