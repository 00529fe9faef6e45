"""What a bootstrap server knows: routes of prefill instances, rooms, and metadata of transfer engines. No HTTP here.

The calls are SGLang's. An instance of ours keeps its route alive by repeating it; SGLang's come once and stay.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from moonlang.base.clock import NS_PER_S

ROUTE_NS = 5 * NS_PER_S  # after so long without a repetition a route of ours is forgotten
ROOM_NS = 120 * NS_PER_S
MAX_ROUTES = 4096
MAX_ROOMS = 1 << 18
MAX_METADATA_BYTES = 256 << 20


class Route(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=False):
    """One rank of a prefill instance. instance, host and port: of MoonLang's link; the other names are SGLang's."""

    rank_ip: str = ""
    rank_port: int = 0
    instance: str = ""
    host: str = ""
    port: int = 0
    attn_tp_size: int = 1
    attn_tp_rank: int = 0
    attn_cp_size: int = 1
    attn_cp_rank: int = 0
    attn_dp_size: int = 1
    attn_dp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    system_dp_size: int = 1
    system_dp_rank: int = 0
    page_size: int = 1
    kv_cache_dtype: str = "auto"
    load_balance_method: str = "auto"
    decode_allocation_policy: str = "early"
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    prefill_http_port: int = 0

    @property
    def dp_size(self) -> int:
        return max(self.attn_dp_size, self.system_dp_size)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """dp, cp, tp and pp rank."""
        dp = self.attn_dp_rank if self.attn_dp_size > 1 else self.system_dp_rank
        return dp, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank


class Registry:
    """Owned by one thread. `now_ns` is monotonic."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, tuple[int, int, int, int]], tuple[Route, int]] = {}
        self._rooms: OrderedDict[int, tuple[int, int]] = OrderedDict()  # room -> (dp rank, when)
        self._metadata: dict[str, bytes] = {}
        self._metadata_bytes = 0

    # ---- routes

    def put(self, route: Route, now_ns: int) -> bool:
        """Take a route; False when there are too many."""
        self._forget(now_ns)
        key = (route.instance, route.place)
        if key not in self._routes and len(self._routes) >= MAX_ROUTES:
            return False
        self._routes[key] = (route, now_ns)
        return True

    def withdraw(self, instance: str) -> None:
        """An instance of ours ends."""
        self._routes = {key: value for key, value in self._routes.items() if key[0] != instance or not instance}

    def overview(self, now_ns: int) -> dict[str, Any] | None:
        """What decode asks for first; None until every rank has come."""
        routes = self._live(now_ns)
        if not routes:
            return None
        first = routes[0]
        ours = [route for route in routes if route.instance]
        if not ours and len(routes) < first.attn_tp_size * first.attn_cp_size * first.dp_size * first.pp_size:
            return None
        return {
            "attn_tp_size": first.attn_tp_size,
            "attn_cp_size": first.attn_cp_size,
            "dp_size": first.dp_size,
            "pp_size": first.pp_size,
            "page_size": first.page_size,
            "kv_cache_dtype": first.kv_cache_dtype,
            "follow_bootstrap_room": first.load_balance_method == "follow_bootstrap_room",
            "enable_dsa_cache_layer_split": first.enable_dsa_cache_layer_split,
            "decode_allocation_policy": first.decode_allocation_policy,
            "enable_kv_cache_sharding": first.enable_kv_cache_sharding,
            "prefill_http_port": first.prefill_http_port,
            "target_tp_rank": None,
            "target_cp_rank": None,
            "target_dp_rank": None,
            "target_pp_rank": None,
            "instances": [{"instance": route.instance, "host": route.host, "port": route.port} for route in ours],
        }

    def rank(self, place: tuple[int, int, int, int], now_ns: int) -> dict[str, Any] | None:
        """Where one rank listens; None when it is not known."""
        for route in self._live(now_ns):
            if route.place == place:
                return {"rank_ip": route.rank_ip, "rank_port": route.rank_port}
        return None

    def _live(self, now_ns: int) -> list[Route]:
        self._forget(now_ns)
        return [route for route, _ in self._routes.values()]

    def _forget(self, now_ns: int) -> None:
        self._routes = {
            key: (route, at_ns)
            for key, (route, at_ns) in self._routes.items()
            if not route.instance or now_ns - at_ns < ROUTE_NS
        }

    # ---- rooms

    def put_room(self, room: int, dp_rank: int, now_ns: int) -> None:
        while self._rooms and (
            len(self._rooms) >= MAX_ROOMS or next(iter(self._rooms.values()))[1] <= now_ns - ROOM_NS
        ):
            self._rooms.popitem(last=False)
        self._rooms[room] = (dp_rank, now_ns)

    def dp_ranks(self, rooms: list[int]) -> dict[str, int]:
        """The ranks of the rooms that are known."""
        return {str(room): self._rooms[room][0] for room in rooms if room in self._rooms}

    # ---- metadata of transfer engines, as Mooncake's HTTP metadata server keeps it

    def metadata(self, key: str) -> bytes | None:
        return self._metadata.get(key)

    def put_metadata(self, key: str, value: bytes) -> bool:
        """Keep a value, in place of an older one: an engine that starts again under its name must not be refused.

        False when there is no room for it.
        """
        size = self._metadata_bytes - len(self._metadata.get(key, b"")) + len(value)
        if size > MAX_METADATA_BYTES:
            return False
        self._metadata[key], self._metadata_bytes = value, size
        return True

    def drop_metadata(self, key: str) -> bool:
        """False when there was none."""
        value = self._metadata.pop(key, None)
        self._metadata_bytes -= len(value or b"")
        return value is not None
