"""The backends of moe.exchange as tests and benchmarks open them: ranks of one host, also over the network."""

from __future__ import annotations

from pathlib import Path

from moonlang.base import registry
from moonlang.core.seat import Seat
from moonlang.distributed.group import Group
from moonlang.moe.exchange.port import ExchangeSpec, ExpertExchange, check_ways
from moonlang.mooncake.config import MooncakeConfig
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.exchange_remote import open_between_hosts

BACKENDS = ("torch", "mooncake", "mooncake_tcp")


def seat(folder: Path, rank: int, size: int, backend: str = "shared_memory", patience_s: float = 30.0) -> Seat:
    return Seat(
        rank=rank,
        size=size,
        meeting=str(folder / f"meeting-{size}-{backend}"),
        plans="",
        backend=backend,
        patience_s=patience_s,
        local_size=size,
    )


def join(place: Seat) -> Group:
    return registry.find("distributed", place.backend).BACKEND(place)


def open_exchange(backend: str, spec: ExchangeSpec, place: Seat, group: Group) -> ExpertExchange:
    """mooncake_tcp: as between hosts."""
    if backend != "mooncake_tcp":
        return registry.find("moe.exchange", backend).BACKEND(spec, place, group)
    opened = open_between_hosts(spec, place, group, Engine(MooncakeConfig(local_hostname="127.0.0.1")))
    check_ways(opened, spec, group)
    return opened
