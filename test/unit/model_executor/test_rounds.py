"""Ranks that share experts: they wake each other, step together, and end together."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from expert_exchanges import join, seat
from rank_threads import on_every_rank

from moonlang.base.errors import PeerError
from moonlang.base.wakeup import Wakeup
from moonlang.core.plan import Row, StepPlan, StepResult
from moonlang.distributed.bells import Bells
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.rounds import Meeting, Others, RoundExecutor

SIZE = 3
DEADLINE_S = 30.0


class Runner:
    """Fails when another rank does not take part in a step."""

    def __init__(self, together: threading.Barrier) -> None:
        self._together = together
        self.steps = 0

    def run(self, plan: StepPlan, progress: Progress) -> StepResult:
        self._together.wait(DEADLINE_S)
        self.steps += 1
        return StepResult(plan.plan_id, ())


class Rank:
    def __init__(self, folder: Path, rank: int, runner: Runner, others: Others | None = None) -> None:
        place = seat(folder, rank, SIZE)
        self.runner = runner
        bells = Bells(str(folder / "plans"), rank, SIZE)
        self.executor = RoundExecutor(self.runner, 4, Meeting(join(place), bells), others)
        self._closed = False

    def submit(self, *numbers: int, rows: bool = True) -> None:
        for number in numbers:
            self.executor.submit(StepPlan(number, 0, (), (Row(0, 0, 0, 1, (1,), True),) if rows else ()))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.executor.close()

    def results(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            assert select.select([self.executor.fileno()], [], [], DEADLINE_S)[0]
            found += [result.plan_id for result in self.executor.poll()]
        return found


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Rank]]:
    together = threading.Barrier(SIZE)
    ranks = on_every_rank(SIZE, lambda rank: Rank(tmp_path, rank, Runner(together)))
    yield ranks
    on_every_rank(SIZE, lambda rank: ranks[rank].close())
    assert len({rank.runner.steps for rank in ranks}) == 1
    assert not list(tmp_path.glob("plans*"))


def test_one_rank_has_work_and_all_step(ranks: list[Rank]) -> None:
    ranks[1].submit(0, 1, 2)
    assert ranks[1].results(3) == [0, 1, 2]
    ranks[1].submit(3)
    assert ranks[1].results(1) == [3]


def test_all_have_work_and_step_together(ranks: list[Rank]) -> None:
    for turn in range(20):
        for number, rank in enumerate(ranks):
            rank.submit(*range(turn * 4, turn * 4 + 1 + (turn + number) % 3))
        for number, rank in enumerate(ranks):
            count = 1 + (turn + number) % 3
            assert rank.results(count) == list(range(turn * 4, turn * 4 + count))


def test_a_plan_without_rows_is_a_step_too(ranks: list[Rank]) -> None:
    ranks[0].submit(0, 1, rows=False)
    ranks[2].submit(0)
    assert ranks[0].results(2) == [0, 1]
    assert ranks[2].results(1) == [0]


def test_the_end_of_one_is_the_end_of_all(ranks: list[Rank]) -> None:
    ranks[0].submit(0)
    assert ranks[0].results(1) == [0]
    threads = [thread for thread in threading.enumerate() if thread.name == "model-executor"]
    assert len(threads) == SIZE
    ranks[2].close()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


class Lossy(Runner):
    """Loses the last rank in its first step."""

    def run(self, plan: StepPlan, progress: Progress) -> StepResult:
        result = super().run(plan, progress)
        if self.steps == 1:
            raise PeerError("Rank 2 has ended.")
        return result

    def meet(self, together: threading.Barrier) -> None:
        self._together = together


class Fewer:
    """Those that are left: all but the last, whose executor ends."""

    broken = False

    def __init__(self, folder: Path, rank: int, runner: Lossy, together: threading.Barrier) -> None:
        self._place = seat(folder, rank, SIZE - 1) if rank < SIZE - 1 else None
        self._folder, self._runner, self._together = folder, runner, together
        self._never = Wakeup()

    def fileno(self) -> int:
        return self._never.fileno()

    def meet_again(self, stop: Callable[[], bool]) -> Meeting | None:
        place, self._place = self._place, None
        if place is None:  # the second time the other one is closed
            return None
        self._runner.meet(self._together)
        bells = Bells(str(self._folder / "fewer"), place.rank, place.size)
        return Meeting(join(place), bells)


def test_those_that_are_left_run_their_plans_once_more(tmp_path: Path) -> None:
    all_of_them, left = threading.Barrier(SIZE), threading.Barrier(SIZE - 1)

    def make(rank: int) -> Rank:
        runner = Lossy(all_of_them)
        return Rank(tmp_path, rank, runner, Fewer(tmp_path, rank, runner, left))

    ranks = on_every_rank(SIZE, make)
    ranks[0].submit(0, 1, 2)
    assert ranks[0].results(3) == [0, 1, 2]
    ranks[1].submit(0)  # which waits now, and is woken by the bells of the new meeting
    assert ranks[1].results(1) == [0]
    on_every_rank(SIZE, lambda rank: ranks[rank].close())
    assert [rank.runner.steps for rank in ranks] == [5, 5, 1]
