"""The receipt of one sequence: where its time went, and which tier its prompt came from."""

from __future__ import annotations

from typing import Any

from moonlang.base import clock
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import StreamHead, TextDelta
from moonlang.entrypoints.client import EngineClient


class Receipt:
    """Filled from the deltas of one sequence. Times are taken here, so they hold all but the way through the socket.

    head: None before the first delta; output_tokens: so far.
    """

    __slots__ = ("_first_ns", "_start_ns", "head", "output_tokens")

    def __init__(self) -> None:
        self._start_ns = clock.monotonic_ns()
        self._first_ns = 0
        self.head: StreamHead | None = None
        self.output_tokens = 0

    def add(self, delta: TextDelta) -> None:
        if delta.head is not None:
            self.head = delta.head
        if delta.tokens:
            self.output_tokens += len(delta.tokens)
            if not self._first_ns:
                self._first_ns = clock.monotonic_ns()

    @property
    def first_token_ns(self) -> int:
        """From the start to the first token; 0 before it."""
        return self._first_ns - self._start_ns if self._first_ns else 0

    def elapsed_ns(self) -> int:
        """Since the start."""
        return clock.monotonic_ns() - self._start_ns

    def cached_details(self, args: ServerArgs) -> dict[str, Any]:
        """From which tier the cached prefix came, in tokens; and if there is a store that brought nothing, why."""
        head = self.head
        cached, host, storage = (head.cached_tokens, head.host_tokens, head.storage_tokens) if head else (0, 0, 0)
        details: dict[str, Any] = {"device": cached - host - storage, "host": host}
        if args.hicache_storage_backend is not None or storage:
            details |= {"storage": storage, "storage_backend": args.hicache_storage_backend}
            details["storage_miss"] = head.tier_miss if head else ""
        return details

    def meta_info(self, client: EngineClient, last: TextDelta) -> dict[str, Any]:
        """`meta_info` of a choice in an OpenAI answer. last: its last delta, or all of them as one."""
        head, elapsed_ns = self.head, self.elapsed_ns()
        return {
            "id": last.rid,
            "prompt_tokens": head.prompt_tokens if head is not None else 0,
            "completion_tokens": self.output_tokens,
            "cached_tokens": head.cached_tokens if head is not None else 0,
            "cached_tokens_details": self.cached_details(client.args),
            "num_retractions": last.retractions,
            "e2e_latency": elapsed_ns / clock.NS_PER_S,
            "receipt": self.fields(client.page_size, elapsed_ns),
        }

    def fields(self, page_size: int, elapsed_ns: int) -> dict[str, Any]:
        """`receipt` of an answer's meta_info: seconds per stage, in their order, and the prompt's pages by source.

        elapsed_ns: what the stages add up to.
        """
        head = self.head
        stages = self._stages(head, elapsed_ns)
        pages: dict[str, int] = {}
        if head is not None:
            computed = max(0, head.prompt_tokens - head.cached_tokens)
            device = head.cached_tokens - head.host_tokens - head.storage_tokens
            pages = {
                "device": device,
                "host": head.host_tokens,
                "storage": head.storage_tokens,
                "computed": computed,
                "received": head.handover.tokens if head.handover is not None else 0,
            }
        return {
            "stages": [{"name": name, "seconds": ns / clock.NS_PER_S} for name, ns in stages],
            "prompt_tokens_by_source": pages,
            "page_size": page_size,
        }

    def _stages(self, head: StreamHead | None, total: int) -> list[tuple[str, int]]:
        """What there is of: queue, prefill, transfer, decode. They add up to `total`, the time elapsed.

        At a decode instance the first two are as its peer measured them, and transfer is what they leave of the time
        until all pages had landed: the two finding each other, and what was sent after the last token was computed.
        """
        if head is None:
            return [("queue", total)]
        first = self.first_token_ns or total
        move = head.handover
        if move is None:
            queue = min(head.queue_ns, first)
            if not head.stream:  # it came in one piece
                return [("queue", queue), ("compute", total - queue)]
            return [("queue", queue), ("prefill", first - queue), ("decode", total - first)]
        queue = min(max(move.queue_ns, 0), first)
        prefill = min(max(move.compute_ns, 0), first - queue)
        return [
            ("queue", queue),
            ("prefill", prefill),
            ("transfer", first - queue - prefill),
            ("decode", total - first),
        ]
