"""Run cases: one, many on several cores, and a failing one again and again until little of it is left.

Three kinds of world: `plain`, one server; `pd`, prefill and decode servers; `tiers`, servers with host memory and a
store that they share. A seed of `mixed` is of one of them.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moonlang.base.errors import MoonLangError
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim import checkers
from moonlang.sim.checkers import replay
from moonlang.sim.pd import checkers as pd_checkers
from moonlang.sim.pd.workload import PdCase
from moonlang.sim.pd.workload import draw as draw_pd
from moonlang.sim.pd.world import PdWorld
from moonlang.sim.stage import Checker
from moonlang.sim.tiers.workload import TierCase
from moonlang.sim.tiers.workload import draw as draw_tiers
from moonlang.sim.tiers.world import TierWorld
from moonlang.sim.violation import Violation
from moonlang.sim.workload import Case, draw
from moonlang.sim.world import World

MakeScheduler = Callable[[SchedulerConfig], Scheduler]
AnyCase = Case | PdCase | TierCase
Kind = Literal["plain", "pd", "tiers"]
KINDS = ("mixed", "plain", "pd", "tiers")

_PD_EVERY = 5  # of the seeds of "mixed" one in so many, and as many have tiers

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known after one run. failure: the violation as (checker, message)."""

    seed: int
    kind: Kind
    steps: int
    virtual_ns: int
    digest: str
    failure: tuple[str, str] | None = None


def kind_of(seed: int, kinds: str) -> Kind:
    """The kind of world of a seed, of those in KINDS."""
    if kinds == "mixed":
        return {_PD_EVERY - 1: "pd", _PD_EVERY - 2: "tiers"}.get(seed % _PD_EVERY, "plain")  # type: ignore[return-value]
    return kinds  # type: ignore[return-value]


def draw_case(seed: int, kind: Kind) -> AnyCase:
    """Case number `seed` of its kind."""
    draws: dict[Kind, Callable[[int], AnyCase]] = {"plain": draw, "pd": draw_pd, "tiers": draw_tiers}
    return draws[kind](seed)


def run(
    case: AnyCase,
    *,
    make_scheduler: MakeScheduler = Scheduler,
    watch: Callable[[], Sequence[Checker[World]]] = checkers.fresh,
    again: bool = False,
    trace: Callable[[str], None] | None = None,
) -> Outcome:
    """One case under all checkers, a plain one under those that `watch` makes; `again` adds the replay."""
    world: World | PdWorld | TierWorld
    match case:
        case PdCase():
            kind, world = "pd", PdWorld(case, pd_checkers.fresh(), make_scheduler, trace)
        case TierCase():
            kind, world = "tiers", TierWorld(case, watch, make_scheduler, trace)
        case Case():
            kind, world = "plain", World(case, watch(), make_scheduler, trace)
    failure = None
    try:
        world.run()
        if again:
            replay.check(_unwatched(case), world.digest)
    except Violation as violation:
        failure = (violation.checker, violation.message)
    except _CRASHES as error:
        failure = ("crash", f"{type(error).__name__}: {error} ({_where(error)})")
    return Outcome(
        seed=case.seed,
        kind=kind,
        steps=world.steps,
        virtual_ns=world.now_ns,
        digest=world.digest,
        failure=failure,
    )


def _unwatched(case: AnyCase) -> World | PdWorld | TierWorld:
    """The same world without checkers."""
    match case:
        case PdCase():
            return PdWorld(case)
        case TierCase():
            return TierWorld(case, list)
        case Case():
            return World(case, ())


def run_seed(seed: int, kinds: str = "plain") -> Outcome:
    """Case `seed`, some of them twice."""
    return run(draw_case(seed, kind_of(seed, kinds)), again=seed // _PD_EVERY % _REPLAY_EVERY == 0)


def run_seeds(seeds: Iterable[int], jobs: int, kinds: str = "plain") -> Iterator[Outcome]:
    """The outcomes in the order of the seeds, computed by `jobs` processes."""
    one = functools.partial(run_seed, kinds=kinds)
    if jobs <= 1:
        yield from map(one, seeds)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(one, seeds, chunksize=8)


def combined_digest(digests: Iterable[str]) -> str:
    """One digest for many runs."""
    total = hashlib.blake2b(digest_size=8)
    for digest in digests:
        total.update(digest.encode())
    return total.hexdigest()


def shrink(case: AnyCase, checker: str, *, make_scheduler: MakeScheduler = Scheduler) -> AnyCase:
    """A case with fewer requests and faults that still fails the same checker: drop halves, then ever smaller parts."""
    left = case.indexes
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
