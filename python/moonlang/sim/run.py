"""Run cases: one, many on several cores, and a failing one again and again until few of its requests are left."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moonlang.base.errors import MoonLangError
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import checkers
from moonlang.sim.checkers import replay
from moonlang.sim.stage import Checker
from moonlang.sim.violation import Violation
from moonlang.sim.workload import Case, draw
from moonlang.sim.world import World

MakeScheduler = Callable[[SchedulerConfig], Scheduler]

_REPLAY_EVERY = 8  # one case in so many is run twice
_SHRINK_RUNS = 300
# What a bug in the brain looks like when it is not a violation of a checker.
_CRASHES = (
    MoonLangError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known after one run. failure: the violation as (checker, message)."""

    seed: int
    steps: int
    virtual_ns: int
    digest: str
    failure: tuple[str, str] | None = None


def run(
    case: Case,
    *,
    make_scheduler: MakeScheduler = Scheduler,
    watch: Callable[[], Sequence[Checker[World]]] = checkers.fresh,
    again: bool = False,
    trace: Callable[[str], None] | None = None,
) -> Outcome:
    """One case under the checkers that `watch` makes; `again` adds the replay."""
    world = World(case, watch(), make_scheduler, trace)
    failure = None
    try:
        world.run()
        if again:
            replay.check(case, world.digest)
    except Violation as violation:
        failure = (violation.checker, violation.message)
    except _CRASHES as error:
        failure = ("crash", f"{type(error).__name__}: {error} ({_where(error)})")
    return Outcome(seed=case.seed, steps=world.steps, virtual_ns=world.now_ns, digest=world.digest, failure=failure)


def run_seed(seed: int) -> Outcome:
    """Case `seed`, some of them twice."""
    return run(draw(seed), again=seed % _REPLAY_EVERY == 0)


def run_seeds(seeds: Iterable[int], jobs: int) -> Iterator[Outcome]:
    """The outcomes in the order of the seeds, computed by `jobs` processes."""
    if jobs <= 1:
        yield from map(run_seed, seeds)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(run_seed, seeds, chunksize=8)


def combined_digest(digests: Iterable[str]) -> str:
    """One digest for many runs."""
    total = hashlib.blake2b(digest_size=8)
    for digest in digests:
        total.update(digest.encode())
    return total.hexdigest()


def shrink(case: Case, checker: str, *, make_scheduler: MakeScheduler = Scheduler) -> Case:
    """A case with fewer requests that still fails the same checker: drop halves, then ever smaller parts."""
    left = [script.index for script in case.scripts]
    part = len(left) // 2
    runs = 0
    while part >= 1 and runs < _SHRINK_RUNS:
        at = 0
        while at < len(left) and runs < _SHRINK_RUNS:
            fewer = left[:at] + left[at + part :]
            outcome = run(case.keep(fewer), make_scheduler=make_scheduler)
            runs += 1
            if outcome.failure is not None and outcome.failure[0] == checker:
                left = fewer
            else:
                at += part
        part //= 2
    return case.keep(left)


def _where(error: BaseException) -> str:
    """File and line of the innermost frame."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}" if trace is not None else "?"
