"""What every backend of moe.exchange keeps: tokens reach their experts and come back; nobody hangs for a lost rank."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from expert_exchanges import BACKENDS, join, open_exchange, seat
from rank_threads import on_every_rank
from torch import Tensor

from moonlang.base import clock
from moonlang.base.errors import PeerError
from moonlang.kernels.expert_weights import native
from moonlang.moe.exchange.port import ExchangeSpec, ExpertExchange, weighted_sum
from moonlang.moe.placement import Placement, even

EXPERTS, PER_TOKEN, COLUMNS = 7, 3, 20


def spec(dtype: torch.dtype = torch.bfloat16, lanes: int = 1) -> ExchangeSpec:
    return ExchangeSpec(experts=EXPERTS, per_token=PER_TOKEN, columns=COLUMNS, dtype=dtype, lanes=lanes)


def tokens(seed: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts, weights of one rank."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, COLUMNS, generator=made).to(dtype)
    experts = torch.stack([torch.randperm(EXPERTS, generator=made)[:PER_TOKEN] for _ in range(max(1, count))])[:count]
    return x, experts, torch.rand(count, PER_TOKEN, generator=made)


def through(
    exchange: ExpertExchange, x: Tensor, experts: Tensor, weights: Tensor, placement: Placement, rank: int
) -> Tensor:
    """Expert e multiplies by e + 1."""
    arrived, held = exchange.dispatch(x, experts, placement), placement.slots[rank]
    assert len(arrived.counts) == len(held)
    assert sum(arrived.counts) == len(arrived.rows)
    parts = arrived.rows.split(arrived.counts)
    outputs = torch.cat([part * (expert + 1) for part, expert in zip(parts, held, strict=True)])
    return exchange.combine(outputs, weights)


def scattered(ranks: int, turn: int) -> Placement:
    """Experts in some order, with copies of some: another placement in every turn."""
    chosen = random.Random(turn)
    slots = [*range(EXPERTS), *(chosen.randrange(EXPERTS) for _ in range(turn % 5))]
    chosen.shuffle(slots)
    return Placement(tuple(tuple(slots[rank::ranks]) for rank in range(ranks)))


def expected(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    return weighted_sum(x.unsqueeze(1) * (experts + 1).unsqueeze(2).to(x.dtype), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "size"), [(name, 2) for name in BACKENDS] + [("torch", 3), ("mooncake", 4)])
def test_there_and_back(backend: str, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also when a rank has no tokens, and in many rounds of different sizes, wherever the experts are."""
    what = spec(dtype)

    def work(rank: int) -> None:
        place = seat(tmp_path, rank, size)
        exchange = open_exchange(backend, what, place, group := join(place))
        for turn in range(12):
            mine = tokens(turn * size + rank, (turn * 5 + rank * 11) % 23, dtype)
            got = through(exchange, *mine, scattered(size, turn), rank)
            torch.testing.assert_close(got, expected(*mine))  # whether a sum is fused is the backend's affair
        group.barrier()
        exchange.close()

    on_every_rank(size, work)


@pytest.mark.parametrize("backend", BACKENDS)
def test_native_lanes_carry_the_same(backend: str, tmp_path: Path) -> None:
    """What programs use: all experts of a token on one rank, one row at a time."""
    what = spec()

    def work(rank: int) -> None:
        place = seat(tmp_path, rank, 2)
        exchange = open_exchange(backend, what, place, group := join(place))
        (lane,), placement = exchange.native, even(EXPERTS, 2)
        for count in (1, 0, 9):
            x, experts, weights = tokens(rank, count, torch.bfloat16)
            lane.dispatch(x, experts.int(), native(placement))
            begin = lane.arrived()
            rows = torch.empty(begin[-1], COLUMNS, dtype=torch.bfloat16)
            lane.rows(rows)
            for i, expert in enumerate(placement.slots[rank]):
                rows[begin[i] : begin[i + 1]] *= expert + 1
            lane.give_back(rows)
            lane.combine(weights, y := torch.empty_like(x))
            torch.testing.assert_close(y, expected(x, experts, weights))
        group.barrier()
        exchange.close()

    on_every_rank(2, work)


def several(exchange: ExpertExchange, turns: int, rank: int) -> None:
    for turn in range(turns):
        through(exchange, *tokens(turn, 5, torch.bfloat16), even(EXPERTS, 2), rank)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_ends_is_an_error_for_the_others(backend: str, tmp_path: Path) -> None:
    """Soon: a transfer engine takes a second or two to close, which is when the others notice."""
    what = spec()

    def work(rank: int) -> float:
        place = seat(tmp_path, rank, 2, patience_s=3.0 if backend == "mooncake_tcp" else 60.0)
        exchange = open_exchange(backend, what, place, group := join(place))
        group.barrier()
        if rank == 1:
            exchange.close()
            return 0.0
        begin_ns = clock.monotonic_ns()
        with pytest.raises(PeerError):
            several(exchange, 3, rank)
        exchange.close()
        return (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S

    assert on_every_rank(2, work)[0] < 30.0


def test_shared_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        place = seat(tmp_path, rank, 2)
        exchange = open_exchange("mooncake", spec(lanes=2), place, join(place))
        assert len(exchange.native) == 2
        exchange.close()

    on_every_rank(2, work)
    assert not list(Path("/dev/shm").glob(f"mcss_{os.getpid()}_*"))
    assert not list(tmp_path.iterdir())
