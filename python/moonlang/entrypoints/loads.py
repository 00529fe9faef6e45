"""How busy the engine is, in the shapes of /v1/loads and /get_load."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from moonlang.base import clock
from moonlang.base.errors import RequestError
from moonlang.entrypoints.client import EngineClient
from moonlang.version import __version__

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues")


async def report(client: EngineClient) -> dict[int, dict[str, Any]]:
    """Each scheduler's own numbers, by replica; those that are lost say nothing."""
    return {replica: reply.body for replica, reply in (await client.controls("loads")).items()}


def sections(include: str | None) -> frozenset[str]:
    """What ?include= asks for; everything by default. RequestError 400 on an unknown word."""
    words = [word.strip() for word in include.split(",")] if include else ["all"]
    unknown = [word for word in words if word not in (*SECTIONS, "all")]
    if unknown:
        raise RequestError(f"include must hold {', '.join(SECTIONS)} or all, got {', '.join(unknown)[:64]!r}.")
    return frozenset(SECTIONS if "all" in words else words)


def replica(query: str | None, client: EngineClient) -> int | None:
    """What ?dp_rank= asks for; None: all. RequestError 400 when there is no such replica."""
    if query is None:
        return None
    if not query.isdecimal() or int(query[:9]) >= client.replicas:
        raise RequestError(f"dp_rank must be in [0, {client.replicas - 1}], got {query!r:.64}.")
    return int(query)


def loads(
    client: EngineClient, found: Mapping[int, Mapping[str, Any]], wanted: frozenset[str], only: int | None = None
) -> dict[str, Any]:
    """The body of /v1/loads. found: of `report`; only: the one replica that is asked for."""
    now = datetime.datetime.fromtimestamp(clock.wall_s(), datetime.UTC).isoformat()
    return {
        "timestamp": now,
        "version": __version__,
        "accelerator": client.args.device,
        "num_accelerators": 1,
        "loads": [
            {"timestamp": now, "dp_rank": number, **_sections(client, one, wanted)}
            for number, one in found.items()
            if only is None or number == only
        ],
        "lost": client.lost,
    }


def _sections(client: EngineClient, found: Mapping[str, Any], wanted: frozenset[str]) -> dict[str, Any]:
    load: dict[str, Any] = {}
    if "core" in wanted:
        load.update(_core(client, found))
    if "memory" in wanted:
        page_gb = client.ready.get("scheduler", {}).get("kv_page_bytes", 0) / 1e9
        load["memory"] = {
            "weight_gb": None,
            "kv_cache_gb": page_gb * found["num_pages"],
            "graph_gb": 0.0,
            "token_capacity": found["max_total_tokens"],
        }
    if "queues" in wanted:
        load["queues"] = {
            "waiting": found["num_waiting"],
            "grammar": found["num_grammar"],
            "paused": 0,
            "retracted": 0,
            "prealloc_ready": 0,
        }
    if "disagg" in wanted:
        load["disaggregation"] = _pairs(client.args.disaggregation_mode, found["pairs"])
    for section, name in (("spec", "speculative"), ("lora", "lora")):
        if section in wanted:
            load[name] = None  # not part of this server
    return load


def _core(client: EngineClient, found: Mapping[str, Any]) -> dict[str, Any]:
    waiting = found["num_waiting"] + found["num_grammar"]
    limit = client.ready.get("scheduler", {}).get("max_running_requests") or 0
    return {
        "num_running_reqs": found["num_running"],
        "num_waiting_reqs": waiting,
        "num_waiting_uncached_tokens": found["waiting_tokens"],
        "num_used_tokens": found["used_tokens"],
        "num_total_tokens": found["used_tokens"] + found["waiting_tokens"],
        "num_active_tokens": found["used_tokens"],
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": found["max_total_tokens"],
        "max_running_requests": limit,
        "token_usage": found["token_usage"],
        "gen_throughput": found["gen_throughput"],
        "cache_hit_rate": found["cache_hit_rate"],
        "utilization": found["num_running"] / limit if limit else 0.0,
    }


def _pairs(mode: str, pairs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Queues of a prefill or decode instance; None for a server that works alone. Speed and latency are means."""
    if mode == "null":
        return None
    pairing, moving = pairs["num_pairing"], pairs["num_moving"]
    prefills = mode == "prefill"
    return {
        "mode": mode,
        "prefill_bootstrap_queue_reqs": pairing if prefills else 0,
        "prefill_inflight_queue_reqs": moving if prefills else 0,
        "decode_prealloc_queue_reqs": 0 if prefills else pairing,
        "decode_transfer_queue_reqs": 0 if prefills else moving,
        "decode_retracted_queue_reqs": 0,
        "kv_transfer_speed_gb_s": _mean(pairs["distributions"].get("kv_transfer_speed_gb_s")),
        "kv_transfer_latency_ms": _mean(pairs["distributions"].get("kv_transfer_latency_ms")),
    }


def _mean(found: Mapping[str, Any] | None) -> float:
    return 0.0 if found is None else found["total"] / max(1, sum(found["counts"]))


def legacy(found: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The body of /get_load, which routers still poll."""
    return [
        {
            "dp_rank": number,
            "num_reqs": one["num_running"] + one["num_waiting"] + one["num_grammar"],
            "num_waiting_reqs": one["num_waiting"] + one["num_grammar"],
            "num_tokens": one["used_tokens"] + one["waiting_tokens"],
        }
        for number, one in found.items()
    ]
