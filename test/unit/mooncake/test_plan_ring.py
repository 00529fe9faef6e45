"""Plans through a ring: all ranks get all of them in order, asleep or not, and see rank 0 go."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
from pathlib import Path

import pytest
from rank_threads import on_every_rank

from moonlang.base.errors import PeerError
from moonlang.messaging.plan_line import accept
from moonlang.mooncake.plan_ring import PlanRingReceiver, PlanRingSender

SEATS = int(os.environ.get("MOONLANG_FUZZ_SEATS", "50"))
FRAMES = [b"", b"a plan", b"x" * 3_000_000, *(str(number).encode() for number in range(2000)), b"the last"]


def received(line: PlanRingReceiver) -> list[bytes]:
    """As a worker does: asleep on `fileno` whenever `recv` has nothing more."""
    found: list[bytes] = []
    while not line.ended:
        assert select.select([line.fileno()], [], [], 10)[0]
        found += line.recv()
    line.close()
    return found


def test_every_frame_in_order(tmp_path: Path) -> None:
    address = str(tmp_path / "plans")

    def work(rank: int) -> list[bytes]:
        if rank:
            return received(PlanRingReceiver(address))
        sender = PlanRingSender(address, 3)
        for frame in FRAMES:
            sender.send(frame)
        sender.close()
        return FRAMES

    assert on_every_rank(4, work) == [FRAMES] * 4


def test_an_idle_line_is_silent_and_a_plan_wakes(tmp_path: Path) -> None:
    address, asleep = str(tmp_path / "plans"), threading.Event()

    def work(rank: int) -> None:
        if rank == 0:
            sender = PlanRingSender(address, 1)
            sender.send(b"1")
            assert asleep.wait(60)
            sender.send(b"2")
            sender.close()
            return
        line = PlanRingReceiver(address)
        line.wait(60)
        assert line.recv() == [b"1"]
        assert not select.select([line.fileno()], [], [], 0)[0]
        assert line.recv() == []
        asleep.set()
        line.wait(60)
        assert line.recv() == [b"2"]
        line.wait(60)
        assert line.recv() == []
        assert line.ended
        line.close()

    on_every_rank(2, work)


def test_ranks_that_do_not_come(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="2 of 2 ranks have not come"):
        PlanRingSender(str(tmp_path / "plans"), 2, join_s=0.05)
    with pytest.raises(PeerError, match="does not listen"):
        PlanRingReceiver(str(tmp_path / "nobody"), join_s=0.05)


def test_a_rank_0_that_has_no_ring(tmp_path: Path) -> None:
    address = str(tmp_path / "plans")

    def work(rank: int) -> None:
        if rank == 0:
            accept(address, 1, 10, "")[0].close()
            return
        with pytest.raises(PeerError, match="in another way"):
            PlanRingReceiver(address)

    on_every_rank(2, work)


def test_seats_that_cannot_be_are_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    """MOONLANG_FUZZ_SEATS sets the number: slots and numbers of readers of all sizes, descriptors of all kinds."""
    address, draw = str(tmp_path / "plans"), random.Random(4)
    memory = os.memfd_create("small", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    kinds = [memory, os.eventfd(0, os.EFD_CLOEXEC), os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)]
    opened: list[int] = []

    def work(rank: int) -> None:
        for _ in range(SEATS):
            if rank:
                with pytest.raises(PeerError):
                    PlanRingReceiver(address)
                continue
            (peer,) = accept(address, 1, 60, "")
            numbers = [draw.choice((0, 1, 4, 1 << 16, draw.randrange(1 << 32))) for _ in range(2)]
            said = struct.pack("<II", *numbers)[: draw.choice((8, 8, 8, draw.randrange(8)))]
            socket.send_fds(peer, [said or b"x"], draw.choices(kinds, k=draw.choice((3, 3, 3, draw.randrange(4)))))
            peer.close()

    for _ in range(2):
        on_every_rank(2, work)
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[1] <= opened[0] + SEATS // 10  # not one for each; some of the process's own may come
    for fd in kinds:
        os.close(fd)
