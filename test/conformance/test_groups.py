"""What every backend of `distributed` keeps: the same numbers on every rank, and no hang when one is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import on_every_rank

from moonlang.base import clock, registry
from moonlang.base.errors import PeerError
from moonlang.core.seat import Seat

BACKENDS = ("shared_memory", "gloo")
PATIENCE_S = 60.0
SOON_S = 30.0  # of what is noticed, not waited for
Join = Callable[..., Any]


@pytest.fixture(params=BACKENDS)
def join(request: pytest.FixtureRequest, tmp_path: Path) -> Join:
    """join(rank, size): a group of ranks that meet in a folder of their own."""
    return lambda rank, size, patience_s=PATIENCE_S: registry.find("distributed", request.param).BACKEND(
        Seat(
            rank=rank,
            size=size,
            meeting=str(tmp_path / "meeting"),
            plans="",
            backend=request.param,
            patience_s=patience_s,
        )
    )


def numbers(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(join: Join, size: int) -> None:
    def work(rank: int) -> list[torch.Tensor]:
        group = join(rank, size)
        found = [group.all_reduce(numbers(rank, 3, 5))]
        found += [group.all_gather(torch.tensor([rank, 2 * rank])), group.broadcast(torch.tensor([[rank + 7]]))]
        found += [group.all_reduce(torch.full((2,), rank + 1.0, dtype=torch.bfloat16))]
        group.barrier()
        return found

    every = on_every_rank(size, work)
    parts = [numbers(rank, 3, 5) for rank in range(size)]
    total = parts[0] + parts[1] if size == 2 else (parts[0] + parts[1]) + (parts[2] + parts[3])
    for reduced, gathered, told, narrow in every:
        assert torch.equal(reduced, total)
        assert gathered.tolist() == [[rank, 2 * rank] for rank in range(size)]
        assert told.tolist() == [[7]]
        assert narrow.dtype == torch.bfloat16
        assert narrow.tolist() == [size * (size + 1) / 2] * 2


def test_more_than_fits_at_once(join: Join) -> None:
    """9 MB per rank; the shared memory takes 8."""
    every = on_every_rank(2, lambda rank: join(rank, 2).all_gather(numbers(rank, 9 << 18)))
    for found in every:
        assert torch.equal(found[0], numbers(0, 9 << 18))
        assert torch.equal(found[1], numbers(1, 9 << 18))


def test_many_rounds(join: Join) -> None:
    """Parts are not overwritten before everybody has read them."""

    def work(rank: int) -> list[int]:
        group = join(rank, 3)
        return [int(group.all_gather(torch.tensor(turn * 3 + rank)).sum()) for turn in range(200)]

    expected = [turn * 9 + 3 for turn in range(200)]
    assert on_every_rank(3, work) == [expected] * 3


def test_a_rank_that_ends_is_an_error_for_the_others(join: Join) -> None:
    def work(rank: int) -> float:
        group = join(rank, 2)
        group.barrier()
        if rank == 1:
            group.close()
            return 0.0
        begin_ns = clock.monotonic_ns()
        with pytest.raises(PeerError):
            group.all_reduce(torch.zeros(4))
        return (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S

    assert on_every_rank(2, work)[0] < SOON_S


def test_a_rank_that_does_not_answer_is_an_error_in_time(join: Join) -> None:
    def work(rank: int) -> None:
        group = join(rank, 2, 2.0)
        if rank == 0:
            with pytest.raises(PeerError):
                group.all_reduce(torch.zeros(4))
        alive.append(group)

    alive: list[Any] = []
    on_every_rank(2, work)


DOOMED = """
import signal, sys
from sgl_kernel.ranks import SharedRanks
ranks = SharedRanks(sys.argv[1], 1, 2, part_bytes=8 << 20, patience_ms=60000, spin_us=0)
ranks.exchange(0)
print("joined", flush=True)
signal.pause()
"""


def test_a_killed_process_is_noticed(tmp_path: Path) -> None:
    """The kernel drops its lock, whatever state it was in."""
    meeting = str(tmp_path / "meeting")
    child = subprocess.Popen([sys.executable, "-c", DOOMED, meeting], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        backend = registry.find("distributed", "shared_memory").BACKEND
        group = backend(Seat(rank=0, size=2, meeting=meeting, plans="", backend="shared_memory", patience_s=PATIENCE_S))
        assert child.stdout.readline() == b"joined\n"
        child.send_signal(signal.SIGKILL)
        begin_ns = clock.monotonic_ns()
        with pytest.raises(PeerError, match="Rank 1 has ended"):
            group.barrier()
        assert clock.monotonic_ns() - begin_ns < SOON_S * clock.NS_PER_S
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
