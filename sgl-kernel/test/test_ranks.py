"""Ranks that meet in shared memory, or are carried by Python: threads here, processes in the tests of the engine."""

import threading
import time

import pytest
from sgl_kernel.ranks import CarriedRanks, RankLostError, SharedRanks

LONG_MS = 60_000


def make(path, rank, size=2, part_bytes=4096, patience_ms=LONG_MS, spin_us=0):
    return SharedRanks(str(path), rank, size, part_bytes=part_bytes, patience_ms=patience_ms, spin_us=spin_us)


@pytest.mark.parametrize("spin_us", [0, 50])
def test_every_round_brings_the_parts_of_all(tmp_path, spin_us):
    """A part is still there when a fast rank is a round ahead."""
    size, rounds, wrong = 3, 500, []

    def work(rank):
        ranks = make(tmp_path / "meeting", rank, size, spin_us=spin_us)
        for turn in range(rounds):
            ranks.mine()[:2] = (turn % 256, rank)
            ranks.exchange(2)
            found = [ranks.part(other)[:2].tolist() for other in range(size)]
            if found != [[turn % 256, other] for other in range(size)]:
                wrong.append((turn, rank, found))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_lost_rank(tmp_path):
    stays, leaves = make(tmp_path / "meeting", 0), make(tmp_path / "meeting", 1)
    del leaves
    begin = time.monotonic()
    with pytest.raises(RankLostError, match="Rank 1 has ended"):
        stays.exchange(8)
    assert time.monotonic() - begin < LONG_MS / 2000  # it is noticed, not waited for


def test_a_silent_rank(tmp_path):
    speaks, silent = make(tmp_path / "meeting", 0, patience_ms=100), make(tmp_path / "meeting", 1)
    with pytest.raises(RankLostError, match="Rank 1 has not answered for 100 ms"):
        speaks.exchange(8)
    assert silent.rank == 1


def test_one_rank_is_one_process(tmp_path):
    first = make(tmp_path / "meeting", 0)
    with pytest.raises(RuntimeError, match="meeting"):
        make(tmp_path / "meeting", 0)
    assert first.size == 2


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"rank": -1}, {"rank": 0, "size": 65}, {"rank": 0, "part_bytes": 0}])
def test_wrong_numbers(tmp_path, wrong):
    with pytest.raises(ValueError, match="out of range"):
        make(tmp_path / "meeting", **wrong)


def test_carried_parts():
    """The parts of an exchange are handed over in full, and only so much of them."""
    seen = []

    def carry(parts):
        seen.append([part.tolist() for part in parts])
        parts[0][:] = 9

    ranks = CarriedRanks(1, 2, part_bytes=4096, carry=carry)
    ranks.mine()[:3] = (1, 2, 3)
    ranks.exchange(3)
    assert seen == [[[0, 0, 0], [1, 2, 3]]]
    assert ranks.part(0)[:4].tolist() == [9, 9, 9, 0]
    assert ranks.part(1)[:3].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="more than a part"):
        ranks.exchange(4097)


def test_what_the_carrier_raises():
    def carry(parts):
        raise RankLostError("gone")

    ranks = CarriedRanks(0, 2, part_bytes=1, carry=carry)
    with pytest.raises(RankLostError, match="gone"):
        ranks.exchange(1)
