"""`moonlang sim`: run seeds, repeat one, count the planted mutants that are caught, play a trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moonlang.base import clock
from moonlang.sim import mutants, traces
from moonlang.sim.pd import museum
from moonlang.sim.pd import mutants as pd_mutants
from moonlang.sim.run import KINDS, AnyCase, Outcome, combined_digest, draw_case, kind_of, run, run_seeds, shrink

_SHOWN_FAILURES = 3


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when everything held, 1 when something did not."""
    args = _parser().parse_args(argv)
    if args.mutants:
        return _mutants(args.seeds, args.world)
    if args.trace_file is not None:
        return _play(args)
    if args.seed is not None:
        return _one(draw_case(args.seed, kind_of(args.seed, args.world)), args.keep, args.trace)
    return _many(range(args.start, args.start + args.seeds), args.jobs, args.world)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moonlang sim", description="Run the scheduler under virtual time.")
    parser.add_argument("--seeds", type=int, default=500, metavar="N", help="number of cases (default 500)")
    parser.add_argument("--start", type=int, default=0, metavar="K", help="first seed (default 0)")
    parser.add_argument(
        "--world", choices=KINDS, default="mixed", help="one server, prefill and decode servers, or some of each"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="run this one case")
    parser.add_argument("--keep", type=_numbers, metavar="I,J,...", help="with --seed: only these requests and faults")
    parser.add_argument("--trace", action="store_true", help="with --seed: print everything that happens")
    parser.add_argument("--mutants", action="store_true", help="plant each mutant and say which checker catches it")
    parser.add_argument("--trace-file", metavar="F", help="play a request trace in Mooncake's JSONL format")
    parser.add_argument("--limit", type=int, metavar="N", help="with --trace-file: only the first N requests")
    parser.add_argument(
        "--pages", type=int, default=20_000, help="with --trace-file: pages of the pool (default 20000)"
    )
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _many(seeds: range, jobs: int, kinds: str) -> int:
    begin_ns = clock.monotonic_ns()
    outcomes = list(run_seeds(seeds, jobs, kinds))
    wall_s = (clock.monotonic_ns() - begin_ns) / clock.NS_PER_S
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    steps = sum(outcome.steps for outcome in outcomes)
    virtual_s = sum(outcome.virtual_ns for outcome in outcomes) / clock.NS_PER_S
    digest = combined_digest(outcome.digest for outcome in outcomes)
    _say(
        f"{len(outcomes)} seeds from {seeds.start}, {len(failed)} failed, {steps} steps, {virtual_s:.1f} s of virtual "
        f"time, digest {digest}, {wall_s:.1f} s"
    )
    for outcome in failed[:_SHOWN_FAILURES]:
        _explain(outcome)
    if len(failed) > _SHOWN_FAILURES:
        _say(f"more failing seeds: {', '.join(f'{o.kind} {o.seed}' for o in failed[_SHOWN_FAILURES:])}")
    return 1 if failed else 0


def _one(case: AnyCase, keep: list[int] | None, trace: bool) -> int:
    case = case if keep is None else case.keep(keep)
    for name, config in case.settings.items():
        _say(f"{name}: {config}")
    outcome = run(case, again=True, trace=_say if trace else None)
    if outcome.failure is None:
        _say(f"seed {case.seed} holds: {outcome.steps} steps, digest {outcome.digest}")
        return 0
    if keep is None:
        _explain(outcome)
    else:
        _say(f"seed {case.seed} fails {outcome.failure[0]}: {outcome.failure[1]}")
    return 1


def _explain(outcome: Outcome) -> None:
    """Say what failed, shrink the case and give the command that repeats it."""
    assert outcome.failure is not None
    checker, message = outcome.failure
    case = draw_case(outcome.seed, outcome.kind)
    small = shrink(case, checker)
    _say(f"seed {outcome.seed} fails {checker}: {message}")
    _say(f"  {len(small.indexes)} of its {len(case.indexes)} requests and faults are enough; repeat it with")
    indexes = ",".join(map(str, small.indexes))
    _say(f"  moonlang sim --world {outcome.kind} --seed {outcome.seed} --keep {indexes} --trace")


def _mutants(most_seeds: int, kinds: str) -> int:
    """Every mutant that can change an answer must be caught."""
    exhibits = [exhibit.mutant for exhibit in museum.EXHIBITS]
    everything = (*mutants.MUTANTS, *pd_mutants.MUTANTS, *exhibits)
    chosen = [mutant for mutant in everything if kinds in ("mixed", mutant.kind)]
    stale = [mutant.name for mutant in chosen if mutants.is_stale(mutant)]
    if stale:
        _say(f"the brain has changed, bring these mutants up to date in moonlang.sim: {', '.join(stale)}")
        return 1
    caught, missed = 0, []
    for mutant in chosen:
        verdict = mutants.hunt(mutant, range(most_seeds))
        caught += verdict.caught
        if not (verdict.caught or mutant.equivalent):
            missed.append(mutant.name)
        _say(f"{verdict.describe():<36} {mutant.name}: {mutant.what}{' (changes no answer)' * mutant.equivalent}")
    _say(f"{caught} of {len(chosen)} mutants caught, missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def _play(args: argparse.Namespace) -> int:
    requests = traces.load(args.trace_file, args.limit)
    outcome, report = traces.play(requests, num_pages=args.pages)
    _say(report)
    if outcome.failure is not None:
        _say(f"the trace fails {outcome.failure[0]}: {outcome.failure[1]}")
    return 1 if outcome.failure is not None else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
