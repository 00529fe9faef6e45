"""Tokens that travel to their experts and back: threads here, processes in the tests of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from sgl_kernel import moe
from sgl_kernel.exchange import CarriedMailboxes, Exchange, Mailboxes, Placement, SharedMailboxes
from sgl_kernel.ranks import RankLostError, SharedRanks
from test_moe import EXPERTS, GATINGS, Layer
from torch import Tensor

BOX_BYTES = 1 << 16
LONG_MS = 60_000


def on_every_rank(size: int, work: Callable[[int], Any]) -> list[Any]:
    """work(rank) on a thread each; results by rank."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results


def shared(folder: Path, size: int, patience_ms: int = LONG_MS) -> Callable[[int], Mailboxes]:
    """Mailboxes of ranks that are threads: what they share is any memory."""
    total = SharedMailboxes.memory_bytes(size, BOX_BYTES)
    memory = np.zeros(total, np.uint8)

    def make(rank: int) -> Mailboxes:
        return SharedMailboxes(
            str(folder / "boxes"),
            memory.ctypes.data,
            total,
            rank,
            size,
            box_bytes=BOX_BYTES,
            patience_ms=patience_ms,
            spin_us=0,
            owner=memory,
        )

    return make


def carried(size: int) -> Callable[[int], Mailboxes]:
    """Mailboxes that Python carries."""
    lines = {(a, b): Queue() for a in range(size) for b in range(size)}

    def make(rank: int) -> Mailboxes:
        def post(letters: list[Any]) -> None:
            for to, letter in enumerate(letters):
                if letter is not None:
                    lines[rank, to].put(letter.copy())

        def take(sender: int) -> Any:
            return lines[sender, rank].get(timeout=60)

        return CarriedMailboxes(rank, size, box_bytes=BOX_BYTES, post=post, take=take)

    return make


@pytest.fixture(params=["shared", "carried"])
def open_boxes(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Callable[[int], Mailboxes]]:
    return lambda size: shared(tmp_path, size) if request.param == "shared" else carried(size)


def test_every_round_brings_the_messages_of_all(open_boxes: Any) -> None:
    """Also empty ones; nobody is overtaken."""
    size, rounds = 3, 300
    make = open_boxes(size)

    def work(rank: int) -> None:
        boxes = make(rank)
        for turn in range(rounds):
            sizes = [(turn + to) % 3 for to in range(size)]
            for to in range(size):
                boxes.outbox(to)[:2] = (turn % 256, 10 * rank + to)
            boxes.send(sizes)
            for sender in range(size):
                if sender != rank:
                    expected = [turn % 256, 10 * sender + rank][: (turn + rank) % 3]
                    assert boxes.receive(sender).tolist() == expected

    on_every_rank(size, work)


def test_wrong_calls(tmp_path: Path) -> None:
    boxes = shared(tmp_path, 2)(0)
    for sizes in ([0], [0, -1], [0, BOX_BYTES + 1]):
        with pytest.raises(ValueError, match=r"box|each rank"):
            boxes.send(sizes)
    for sender in (0, 2, -1):
        with pytest.raises(ValueError, match="no such sender"):
            boxes.receive(sender)
    with pytest.raises(ValueError, match="too little memory"):
        SharedMailboxes(str(tmp_path / "x"), 4096, 64, 0, 2, box_bytes=4096, patience_ms=1, spin_us=0, owner=tmp_path)


@pytest.mark.parametrize("ended", [True, False])
def test_a_rank_that_does_not_send(ended: bool, tmp_path: Path) -> None:
    make = shared(tmp_path, 2, patience_ms=LONG_MS if ended else 100)
    stays, other = make(0), make(1)
    if ended:
        del other
    begin = time.monotonic()
    stays.send([0, 4])
    with pytest.raises(RankLostError, match="Rank 1 has ended" if ended else "Rank 1 has not answered for 100 ms"):
        stays.receive(1)
    assert time.monotonic() - begin < LONG_MS / 2000


def even(size: int) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Every rank has its share of the experts."""
    bounds = [EXPERTS * rank // size for rank in range(size + 1)]
    copies = [[(rank, e - bounds[rank])] for rank in range(size) for e in range(bounds[rank], bounds[rank + 1])]
    return copies, [b - a for a, b in pairwise(bounds)]


def copied(size: int) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """As `even`, and the last rank has copies of the first three experts too."""
    copies, held = even(size)
    for i in range(3):
        copies[i].append((size - 1, held[-1] + i))
    held[-1] += 3
    return copies, held


@pytest.mark.parametrize("placement", [even, copied])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_there_and_back(open_boxes: Any, placement: Any, dtype: torch.dtype, size: int) -> None:
    """Each expert multiplies by its number plus one; the sum is in the order of the token's list."""
    tokens, columns, per_token = 40, 24, 4
    x = torch.randn(size, tokens, columns).to(dtype)
    chosen = torch.stack([torch.randperm(EXPERTS)[:per_token] for _ in range(size * tokens)]).int()
    chosen = chosen.view(size, tokens, per_token)
    weights, make, (copies, held) = torch.rand(size, tokens, per_token), open_boxes(size), placement(size)
    names = {place: expert for expert, places in enumerate(copies) for place in places}

    def work(rank: int) -> list[Tensor]:
        exchange, places = Exchange(make(rank)), Placement.of(copies, held)
        found = []
        for count in (tokens, 0, 1 + rank, tokens):
            exchange.dispatch(x[rank, :count], chosen[rank, :count], places)
            begin = exchange.arrived()
            rows = torch.empty(begin[-1], columns, dtype=dtype)
            exchange.rows(rows)
            for slot in range(held[rank]):
                rows[begin[slot] : begin[slot + 1]] *= names[rank, slot] + 1
            exchange.give_back(rows)
            found.append(y := torch.full((count, columns), torch.nan, dtype=dtype))
            exchange.combine(weights[rank, :count], y)
        return found

    for rank, found in enumerate(on_every_rank(size, work)):
        z = x[rank].unsqueeze(1) * (chosen[rank].unsqueeze(2) + 1).to(dtype)
        expected = (z.float() * weights[rank].unsqueeze(2)).sum(1).to(dtype)
        for y in found:
            torch.testing.assert_close(y, expected[: len(y)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_travel_as_int8(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half a step off at most, on the way there only, and the same where nothing travels."""
    x = (torch.randn(30, 40) * torch.logspace(-3, 3, 30).unsqueeze(1)).to(dtype)
    x[7] = 0
    chosen = torch.arange(30).unsqueeze(1).remainder(EXPERTS).int()
    found: dict[int, Tensor] = {}
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        make = shared(tmp_path / str(size), size)

        def work(rank: int, make: Any = make, size: int = size) -> Tensor:
            exchange = Exchange(make(rank), payload="int8")
            exchange.dispatch(x, chosen, Placement.of(*even(size)))
            rows = torch.empty(exchange.arrived()[-1], 40, dtype=dtype)
            exchange.rows(rows)
            exchange.give_back(rows)
            exchange.combine(torch.ones(30, 1), y := torch.empty_like(x))
            return y

        found[size] = on_every_rank(size, work)[0]
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[1], x)
    step = x.float().abs().amax(1, keepdim=True) / 127
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 2.0**-20)
    assert ((found[1].float() - x.float()).abs() <= step * 0.51 + x.float().abs() * rounding).all()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    boxes = shared(tmp_path, 2)(0)
    copies, held = even(2)
    for wrong_copies, wrong_held in ((copies, [6]), (copies, [5, 6]), ([[], *copies[1:]], held)):
        with pytest.raises(ValueError, match=r"place|nowhere|ranks"):
            Placement.of(wrong_copies, wrong_held)
    exchange, places = Exchange(boxes), Placement.of(copies, held)
    most = exchange.most_tokens(64, 2)
    with pytest.raises(ValueError, match="more tokens"):
        exchange.dispatch(torch.zeros(most + 1, 16), torch.zeros(most + 1, 2, dtype=torch.int32), places)
    with pytest.raises(ValueError, match="no such expert"):
        exchange.dispatch(torch.zeros(1, 16), torch.full((1, 2), EXPERTS, dtype=torch.int32), places)
    with pytest.raises(ValueError, match="another number of ranks"):
        exchange.dispatch(torch.zeros(1, 16), torch.zeros(1, 2, dtype=torch.int32), Placement.of(*even(3)))


@pytest.mark.parametrize("garbage", [b"", b"x" * 17, b"\x01" + bytes(7) + b"\x01" + bytes(7) + b"\xff" * 112])
def test_a_message_that_makes_no_sense(garbage: bytes) -> None:
    boxes = CarriedMailboxes(
        0, 2, box_bytes=BOX_BYTES, post=lambda letters: None, take=lambda sender: np.frombuffer(garbage, np.uint8)
    )
    exchange = Exchange(boxes)
    exchange.dispatch(torch.zeros(1, 16), torch.zeros(1, 2, dtype=torch.int32), Placement.of(*even(2)))
    with pytest.raises(RuntimeError, match="message of rank 1"):
        exchange.arrived()


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(("size", "placement"), [(2, even), (3, even), (2, copied)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_over_ranks(lanes: int, size: int, placement: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """The bits of one rank, whatever travels, and how many tokens there are."""
    layer, (copies, held) = Layer(64, 32, dtype, GATINGS[2], shared=True), placement(size)
    x, residual = torch.randn(400, 64).to(dtype), torch.randn(400, 64).to(dtype)
    names = {place: expert for expert, places in enumerate(copies) for place in places}
    makes = []
    for lane in range(lanes):
        (tmp_path / str(lane)).mkdir()
        makes.append(shared(tmp_path / str(lane), size))

    def work(rank: int) -> list[Tensor]:
        ranks = SharedRanks(str(tmp_path / "r"), rank, size, part_bytes=1 << 16, patience_ms=LONG_MS, spin_us=0)
        mine = [names[rank, slot] for slot in range(held[rank])]
        exchanges = [Exchange(make(rank)) for make in makes]
        packed = layer.pack(mine, ranks=ranks, lanes=exchanges, placement=Placement.of(copies, held))
        found = []
        for rows in (1, size, 37, 400):
            y = residual[:rows].clone()
            moe.run_moe(packed, x[:rows], y, y)
            found.append(y)
        return found

    for found in on_every_rank(size, work):
        for y in found:
            assert torch.equal(y, layer.run(x[: len(y)], residual[: len(y)]))


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_layer_over_ranks_with_tokens_of_their_own(lanes: int, tmp_path: Path) -> None:
    """The bits of one rank, when ranks have different numbers of tokens, more than a box holds, or none."""
    size, dtype = 3, torch.bfloat16
    layer, (copies, held) = Layer(64, 32, dtype, GATINGS[2], shared=True), even(size)
    x, residual = torch.randn(size, 300, 64).to(dtype), torch.randn(size, 300, 64).to(dtype)
    names = {place: expert for expert, places in enumerate(copies) for place in places}
    makes = []
    for lane in range(lanes):
        (tmp_path / str(lane)).mkdir()
        makes.append(shared(tmp_path / str(lane), size))
    counts = [(1, 0, 0), (0, 5, 300), (0, 0, 0), (300, 300, 299)]

    def work(rank: int) -> list[Tensor]:
        ranks = SharedRanks(str(tmp_path / "r"), rank, size, part_bytes=1 << 16, patience_ms=LONG_MS, spin_us=0)
        mine = [names[rank, slot] for slot in range(held[rank])]
        exchanges, places = [Exchange(make(rank)) for make in makes], Placement.of(copies, held)
        packed = layer.pack(mine, ranks=ranks, lanes=exchanges, placement=places, own_tokens=True)
        found = []
        for rows in counts:
            y = residual[rank, : rows[rank]].clone()
            moe.run_moe(packed, x[rank, : rows[rank]], y, y)
            found.append(y)
        return found

    for rank, found in enumerate(on_every_rank(size, work)):
        for y in found:
            assert torch.equal(y, layer.run(x[rank, : len(y)], residual[rank, : len(y)]))


def test_a_layer_whose_experts_move(tmp_path: Path) -> None:
    """The same bits before and after; and the choices of all ranks' tokens are counted."""
    size, dtype, rows = 2, torch.bfloat16, 90
    layer = Layer(64, 32, dtype, GATINGS[0], shared=True)
    x = torch.randn(rows, 64).to(dtype)
    make = shared(tmp_path, size)

    def work(rank: int) -> tuple[list[Tensor], Tensor]:
        ranks = SharedRanks(str(tmp_path / "r"), rank, size, part_bytes=1 << 16, patience_ms=LONG_MS, spin_us=0)
        packed, found = None, []
        for copies, held in (even(size), copied(size), even(size)):
            names = {place: expert for expert, places in enumerate(copies) for place in places}
            mine, places = [names[rank, slot] for slot in range(held[rank])], Placement.of(copies, held)
            if packed is None:
                packed = layer.pack(mine, ranks=ranks, lanes=[Exchange(make(rank))], placement=places)
            else:
                packed.hold(places, *layer.experts(mine))
            moe.run_moe(packed, x, y := torch.empty_like(x))
            found.append(y)
        with pytest.raises(ValueError, match="one gate_up"):
            packed.hold(places, *layer.experts(mine[1:]))
        counts = torch.tensor(packed.take_counts())
        assert packed.take_counts() == [0] * EXPERTS
        return found, counts

    results = on_every_rank(size, work)
    for found, _ in results:
        for y in found:
            assert torch.equal(y, layer.run(x))
    layer.packed.take_counts()
    layer.run(x)
    assert torch.equal(sum(counts for _, counts in results), 3 * torch.tensor(layer.packed.take_counts()))


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_layer_over_pairs_of_ranks_with_tokens_of_their_own(lanes: int, tmp_path: Path) -> None:
    """Two ranks have the same tokens, and the other two others: all get the bits of one rank for theirs."""
    size, pair, dtype = 4, 2, torch.bfloat16
    layer, (copies, held) = Layer(64, 32, dtype, GATINGS[2], shared=True), even(size)
    x, residual = torch.randn(size // pair, 300, 64).to(dtype), torch.randn(size // pair, 300, 64).to(dtype)
    names = {place: expert for expert, places in enumerate(copies) for place in places}
    makes = []
    for lane in range(lanes):
        (tmp_path / str(lane)).mkdir()
        makes.append(shared(tmp_path / str(lane), size))
    counts = [(1, 0), (5, 300), (0, 0), (299, 300)]

    def join(name: str, rank: int, size: int) -> SharedRanks:
        return SharedRanks(str(tmp_path / name), rank, size, part_bytes=1 << 13, patience_ms=LONG_MS, spin_us=0)

    def work(rank: int) -> list[Tensor]:
        replica = rank // pair
        ranks, peers = join("r", rank, size), join(f"p{replica}", rank % pair, pair)
        mine = [names[rank, slot] for slot in range(held[rank])]
        exchanges, places = [Exchange(make(rank)) for make in makes], Placement.of(copies, held)
        packed = layer.pack(mine, ranks=ranks, lanes=exchanges, placement=places, own_tokens=True, peers=peers)
        found = []
        for rows in counts:
            y = residual[replica, : rows[replica]].clone()
            moe.run_moe(packed, x[replica, : rows[replica]], y, y)
            found.append(y)
        return found

    for rank, found in enumerate(on_every_rank(size, work)):
        for y in found:
            replica = rank // pair
            assert torch.equal(y, layer.run(x[replica, : len(y)], residual[replica, : len(y)]))


def test_peers_without_tokens_of_their_own_are_refused(tmp_path: Path) -> None:
    layer = Layer(64, 32, torch.float32, GATINGS[2])
    alone = SharedRanks(str(tmp_path / "r"), 0, 1, part_bytes=1 << 12, patience_ms=LONG_MS, spin_us=0)
    with pytest.raises(ValueError, match="in common with all"):
        layer.pack(range(EXPERTS), peers=alone)
