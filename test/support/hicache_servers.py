"""Servers with a hierarchical cache, and what one asks them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from live_server import LiveServer

PROMPT_TOKENS = 768
POOL_TOKENS = 4096
FLAGS = ("--max-total-tokens", str(POOL_TOKENS), "--random-seed", "1", "--enable-metrics", "--enable-cache-report")
PATIENT = ("--hicache-storage-prefetch-policy", "wait_complete")  # what a tiny model computes in no time, it waits for


@dataclass(frozen=True)
class Answer:
    """What must be equal, and where the prompt's KV came from."""

    ids: list[int]
    logprobs: list[Any]
    details: dict[str, Any]
    seconds: float

    def same(self, other: Answer) -> bool:
        return (self.ids, self.logprobs) == (other.ids, other.logprobs)


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 250) for _ in range(tokens)]


class CachedServer(LiveServer):
    """A LiveServer with --enable-hierarchical-cache."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        backend: str = "",
        extra: Mapping[str, Any] = MappingProxyType({}),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.extra = dict(extra)
        store = ["--hicache-storage-backend", backend] if backend else []
        if extra:
            store += ["--hicache-storage-backend-extra-config", json.dumps(dict(extra))]
        super().__init__(folder, *FLAGS, "--enable-hierarchical-cache", *store, *flags, environment=environment)

    def ask(self, ids: list[int], **more: Any) -> Answer:
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
        response = self.http.post("/generate", json={**body, "return_logprob": True, **more})
        assert response.status_code == 200, f"{response.text}\n{self.log}"
        answer = response.json()
        meta = answer["meta_info"]
        return Answer(
            answer["output_ids"], meta["output_token_logprobs"], meta["cached_tokens_details"], meta["e2e_latency"]
        )

    def settle(self) -> dict[str, Any]:
        """The numbers of the tiers as soon as nothing is on its way."""
        self.until(lambda: not self.is_moving())
        return self.tiers()

    def tiers(self) -> dict[str, Any]:
        return self.load()["tiers"]  # type: ignore[return-value]

    def is_moving(self) -> bool:
        tiers = self.tiers()
        return bool(tiers["fetching"] or tiers["queued_pages"])

    def flush(self) -> None:
        """Forget device and host pool."""
        response = self.http.post("/flush_cache", params={"timeout": 60})
        assert response.status_code == 200, response.text

    def is_healthy(self) -> bool:
        return self.http.get("/health").status_code == 200

    def metric(self, name: str) -> float:
        """Sum over all labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
