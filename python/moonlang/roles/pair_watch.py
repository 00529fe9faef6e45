"""Times and sizes of the pairs of one instance, seen from what passes between brain, link and transfers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from moonlang.base.clock import NS_PER_MS
from moonlang.core.pairing import (
    Heard,
    KvCard,
    Landed,
    Linked,
    PairEvent,
    PairMessage,
    Push,
    Refuse,
    Release,
    TransferOp,
    Unreachable,
    Want,
)
from moonlang.core.ticket import Completion, Outcome
from moonlang.observability.distribution import Distribution
from moonlang.observability.pair_bounds import BOUNDS

MAX_ROOMS = 1 << 16
_MB = 1e6
_PREFILL = ("kv_transfer_bootstrap_ms", "kv_transfer_latency_ms", "kv_transfer_speed_gb_s", "kv_transfer_total_mb")
_DECODE = ("kv_transfer_bootstrap_ms", "kv_transfer_alloc_ms", "kv_transfer_latency_ms", "kv_transfer_total_mb")


@dataclass(slots=True)
class _Room:
    """begun_ns: of the step that is under way: looking for each other, then for memory, then moving pages."""

    begun_ns: int
    met: bool = False
    bytes: int = 0


class PairWatch:
    """Feeds the kv_transfer_ histograms.

    Prefill: bootstrap is from the request to its Want, latency and speed are those of single pushes, the size that of a
    request. Decode: bootstrap is until prefill is found, alloc until there is memory, latency from then until all pages
    are verified, prefill's computing included.
    """

    def __init__(self, card: KvCard, *, prefills: bool) -> None:
        self._page_bytes = sum(region.schema.page_bytes for region in card.regions)
        self._found = {name: Distribution(BOUNDS[name]) for name in (_PREFILL if prefills else _DECODE)}
        self._rooms: OrderedDict[int, _Room] = OrderedDict()
        self._pushes: dict[int, int] = {}  # by number: when it was submitted
        self._unreachable = 0

    def begun(self, room: int, now_ns: int) -> None:
        """A request has come."""
        while len(self._rooms) >= MAX_ROOMS:
            self._rooms.popitem(last=False)
        self._rooms[room] = _Room(now_ns)

    def heard(self, event: PairEvent, now_ns: int) -> None:
        match event:
            case Linked(room) | Heard(_, Want(room)) if room in self._rooms and not self._rooms[room].met:
                self._rooms[room].met = True
                self._step("kv_transfer_bootstrap_ms", room, now_ns)
            case Unreachable(room):
                self._unreachable += 1
                self._rooms.pop(room, None)

    def sent(self, body: PairMessage, now_ns: int) -> None:
        match body:
            case Want(room) if room in self._rooms and not self._rooms[room].bytes:
                self._step("kv_transfer_alloc_ms", room, now_ns)
                self._rooms[room].bytes = len(body.pages) * self._page_bytes
            case Release(room, error) if room in self._rooms:
                if not error:
                    self._step("kv_transfer_latency_ms", room, now_ns)
                    self._ended(room)
                self._rooms.pop(room, None)
            case Landed(room) if room in self._rooms:
                self._ended(room)
            case Refuse(room):
                self._rooms.pop(room, None)

    def submitted(self, number: int, op: TransferOp, now_ns: int) -> None:
        if isinstance(op, Push):
            self._pushes[number] = now_ns
            if op.room in self._rooms:
                self._rooms[op.room].bytes += len(op.source) * sum(span.size for span in op.spans)

    def completed(self, number: int, completion: Completion, now_ns: int) -> None:
        begun_ns = self._pushes.pop(number, None)
        if begun_ns is not None and completion.outcome is Outcome.OK:
            took_ns = max(1, now_ns - begun_ns)
            self._found["kv_transfer_latency_ms"].observe(took_ns / NS_PER_MS)
            self._found["kv_transfer_speed_gb_s"].observe(completion.bytes / took_ns)

    def report(self) -> dict[str, Any]:
        """Plain values for the load report."""
        found = {name: {"counts": one.counts, "total": one.total} for name, one in self._found.items()}
        return {"distributions": found, "bootstrap_failed": self._unreachable}

    def _step(self, name: str, room: int, now_ns: int) -> None:
        begun = self._rooms[room]
        self._found[name].observe((now_ns - begun.begun_ns) / NS_PER_MS)
        begun.begun_ns = now_ns

    def _ended(self, room: int) -> None:
        self._found["kv_transfer_total_mb"].observe(self._rooms.pop(room).bytes / _MB)
