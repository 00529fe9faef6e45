"""Fronts that share the knowledge of what they have sent."""

from __future__ import annotations

from pathlib import Path

from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Generate
from moonlang.core.sampling import SamplingParams
from moonlang.entrypoints.dispatch import Dispatch
from moonlang.roles.load_board import LoadBoard, open_board


def test_numbers_of_all_fronts_add_up(tmp_path: Path) -> None:
    boards = [LoadBoard(tmp_path / "loads", front, 3, 2) for front in range(3)]
    boards[0].put(1, 2, 20)
    boards[2].put(1, 5, 7)
    boards[1].put(0, 1, 1)
    assert [[board.total(replica) for replica in (0, 1)] for board in boards] == [[(1, 1), (7, 27)]] * 3
    boards[0].put(1, 0, 0)
    assert boards[1].total(1) == (5, 7)


def test_a_front_sees_what_another_has_sent(tmp_path: Path) -> None:
    first, second = (
        Dispatch("total_tokens", 2, board=LoadBoard(tmp_path / "loads", front, 2, 2), turn=front) for front in (0, 1)
    )
    message = Generate("r", [0], SamplingParams())
    first.began(1, 100)
    assert [second.choose(message) for _ in range(3)] == [0, 0, 0]
    first.grew(0, 300)
    assert [second.choose(message) for _ in range(3)] == [1, 1, 1]
    first.ended(1, 100)
    first.began(0, 1)
    assert second.choose(message) == 1


def test_there_is_one_only_when_it_says_something(tmp_path: Path) -> None:
    for fronts, replicas, wanted in ((1, 2, False), (2, 1, False), (2, 2, True)):
        args = ServerArgs.create(tokenizer_worker_num=fronts, dp_size=replicas)
        assert (open_board(tmp_path, args, 0) is not None) is wanted
