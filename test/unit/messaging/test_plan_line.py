"""The line from rank 0 to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from free_ports import free_port
from rank_threads import on_every_rank

from moonlang.base.errors import ConfigError, PeerError
from moonlang.messaging.plan_line import PlanReceiver, PlanSender

FRAMES = [b"", b"a plan", b"x" * 3_000_000, b"the last"]


def received(line: PlanReceiver) -> list[bytes]:
    found: list[bytes] = []
    while not line.ended:
        line.wait(10)
        found += line.recv()
    line.close()
    return found


@pytest.mark.parametrize("where", ["path", "tcp"])
def test_every_frame_in_order(where: str, tmp_path: Path) -> None:
    address = str(tmp_path / "plans") if where == "path" else f"tcp://127.0.0.1:{free_port()}"

    def work(rank: int) -> list[bytes]:
        if rank:
            return received(PlanReceiver(address))
        sender = PlanSender(address, 2)
        for frame in FRAMES:
            sender.send(frame)
        sender.close()
        return FRAMES

    assert on_every_rank(3, work) == [FRAMES] * 3


def test_ranks_that_do_not_come(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="2 of 2 ranks have not come"):
        PlanSender(str(tmp_path / "plans"), 2, join_s=0.05)
    with pytest.raises(PeerError, match="does not listen"):
        PlanReceiver(str(tmp_path / "nobody"), join_s=0.05)


def test_a_rank_that_is_gone(tmp_path: Path) -> None:
    address = str(tmp_path / "plans")

    def work(rank: int) -> None:
        if rank:
            PlanReceiver(address).close()
            return
        sender = PlanSender(address, 1)
        with pytest.raises(PeerError, match="does not take its plans"):
            sender.send(b"x" * 10_000_000)
        sender.close()

    on_every_rank(2, work)


def test_who_does_not_know_the_token_gets_no_plan(tmp_path: Path) -> None:
    address = str(tmp_path / "plans")

    def work(rank: int) -> list[bytes]:
        if rank == 0:
            sender = PlanSender(address, 1, token="secret")
            sender.send(b"a plan")
            sender.close()
        elif rank == 1:
            with pytest.raises(PeerError, match="token"):
                PlanReceiver(address, token="other")
            return received(PlanReceiver(address, token="secret"))
        return []

    assert on_every_rank(2, work)[1] == [b"a plan"]


def test_addresses() -> None:
    with pytest.raises(ConfigError, match="no address"):
        PlanReceiver("tcp://nowhere", join_s=0)
