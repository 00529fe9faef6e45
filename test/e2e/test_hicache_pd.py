"""Prefill and decode share a store: what decode has answered, prefill finds at the next turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mooncake_services
from hicache_servers import PATIENT, prompt
from live_server import LiveServer
from pd_servers import FLAGS, PdServer, couple

TURN = {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True}


def settle(server: PdServer) -> dict[str, Any]:
    def is_moving() -> bool:
        tiers: dict[str, Any] = server.load()["tiers"]  # type: ignore[assignment]
        return bool(tiers["fetching"] or tiers["queued_pages"])

    server.wait_free()
    server.until(lambda: not is_moving())
    return server.load()["tiers"]  # type: ignore[return-value]


def test_the_next_turn_finds_the_answer_at_prefill(tmp_path: Path) -> None:
    """Transfers and store are Mooncake's, in the same processes."""
    with mooncake_services.master(tmp_path) as master:
        extra = {"master_server_address": master.address, "protocol": "tcp", "local_buffer_size": "1mb"}
        store = ("--hicache-storage-backend", "mooncake", *PATIENT)

        def config(segment: str) -> tuple[str, str]:
            return "--hicache-storage-backend-extra-config", json.dumps({**extra, "global_segment_size": segment})

        with couple(
            tmp_path,
            "mooncake",
            *store,
            prefill=("--enable-hierarchical-cache", *config("0")),
            decode=("--disaggregation-decode-enable-offload-kvcache", *config("64mb")),
        ) as both:
            first = both.ask({"input_ids": prompt(1), "sampling_params": TURN}).json()
            assert settle(both.decode)["total_saved_tokens"] > 0
            settle(both.prefill)
            response = both.prefill.http.post("/flush_cache", params={"timeout": 60})
            assert response.status_code == 200, response.text
            told = prompt(1) + first["output_ids"]
            ids = told + prompt(2, 40)
            at_prefill, at_decode = both.submit({"input_ids": ids, "sampling_params": TURN})
            details = at_prefill.result().json()["meta_info"]["cached_tokens_details"]
            second = at_decode.result().json()
            assert details["storage"] >= len(told) - 2 * 16, "the answer's own pages came from the store too"
            assert both.decode.load()["tiers"]["total_store_tokens"] == 0, "decode gets its pages from prefill"
    with LiveServer(tmp_path, *FLAGS) as alone:
        cold = alone.http.post("/generate", json={"input_ids": ids, "sampling_params": TURN}).json()
    assert cold["output_ids"] == second["output_ids"]
