"""A cluster that is not there: the page's own files, and states of so many instances that change with every look."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from moonlang.entrypoints import front
from moonlang.entrypoints.ui import site
from moonlang.mem_cache.tier_settings import TierStats
from moonlang.observability.figures import BOUNDS_S
from moonlang.scheduler.settings import PairStats

_BUCKETS = len(BOUNDS_S) + 1


class Crowd:
    """instances: prefill and decode by turns; nodes: of the prefix tree of each."""

    def __init__(self, instances: int, nodes: int) -> None:
        self._random = random.Random(1)
        self._kinds = [("prefill", "decode")[number % 2] for number in range(instances)]
        self._counts = [[[0] * _BUCKETS for _ in range(2)] for _ in self._kinds]
        self._start_s = time.time()
        self._nodes = nodes
        self._next_id = nodes
        self._parents = [-1] + [self._random.randrange(max(0, i - 2000), i) for i in range(1, nodes)]
        self._ids = list(range(nodes))
        self.states = self.trees = 0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(site.Site().router())
        app.add_api_route(site.STATE, self.state, response_model=None)
        app.add_api_route(site.TREE, self.tree, response_model=None)
        return app

    async def state(self, request: Request) -> Response:
        self.states += 1
        found = {
            "kind": "router",
            "version": "",
            "model": "a model of nobody",
            "time_s": time.time(),
            "bounds": {"seconds": BOUNDS_S},
            "instances": [self._instance(number) for number in range(len(self._kinds))],
            "left_out": 0,
        }
        return site.answer(found)

    async def tree(self, request: Request) -> Response:
        """Some nodes are new each time, all have other weights."""
        self.trees += 1
        for _ in range(self._nodes // 50):
            self._ids[self._random.randrange(1, self._nodes)] = self._next_id
            self._next_id += 1
        pages = [self._random.randrange(1, 100) for _ in range(self._nodes)]
        weight, children = pages.copy(), [0] * self._nodes
        for index in range(self._nodes - 1, 0, -1):
            weight[self._parents[index]] += weight[index]
            children[self._parents[index]] += 1
        found: dict[str, Any] = {"parent": self._parents, "id": self._ids, "pages": pages, "weight": weight}
        found |= {"children": children, "num_nodes": 10 * self._nodes, "page_size": 16}
        for name, most in (("hits", 1000), ("idle", 5000), ("locked", 2)):
            found[name] = [self._random.randrange(most) for _ in range(self._nodes)]
        found["texts"] = [f"prefix {number} {self._random.random()}" for number in self._ids[:300]]
        return site.answer(found)

    def _instance(self, number: int) -> dict[str, Any]:
        draw = self._random.randrange
        for counts in self._counts[number]:
            for _ in range(20):
                counts[min(_BUCKETS - 1, int(self._random.gauss(8, 2)))] += 1
        seconds = int(100 * (time.time() - self._start_s))
        load = {
            **{name: draw(50) for name in ("num_running", "num_waiting", "num_grammar")},
            "max_total_tokens": 1_000_000,
            "used_tokens": draw(500_000),
            "cached_tokens": draw(500_000),
            "page_size": 16,
            "token_usage": self._random.random(),
            "cache_hit_rate": self._random.random(),
            **{f"total_{name}_tokens": seconds * factor for name, factor in (("output", 30), ("prompt", 90))},
            "total_cached_tokens": seconds * 40,
            "pairs": msgspec.to_builtins(PairStats(total_moved=seconds, total_moved_bytes=seconds << 20)),
            "tiers": msgspec.to_builtins(TierStats(host_slots=5000, host_used=draw(5000))),
            "store": {"backend": "mooncake"},
        }
        return {
            "id": str(number),
            "name": f"10.0.0.{number}:30000",
            "kind": self._kinds[number],
            "up": draw(30) > 0,
            "problem": "",
            "leaving": False,
            "breaker": "closed",
            "uptime_s": seconds / 100,
            "load": load,
            "process": 1,
            "figures": {
                name: {"counts": counts, "total": 1.0}
                for name, counts in zip(("ttft_s", "itl_s"), self._counts[number], strict=True)
            },
        }


@contextmanager
def serving(crowd: Crowd) -> Iterator[str]:
    """The crowd behind a port of this process; its URL."""
    found: Future[tuple[str, uvicorn.Server]] = Future()

    async def main() -> None:
        with front.listening("127.0.0.1", 0) as listener:
            server = uvicorn.Server(uvicorn.Config(crowd.app(), lifespan="off", log_config=None))
            found.set_result((f"http://127.0.0.1:{listener.getsockname()[1]}", server))
            await server.serve([listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    url, server = found.result(10)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(10)
