"""MoonLang and its peers on one CPU, in turns on the same work: latencies, throughput, start-up and memory.

Every engine serves the same random checkpoint to the same client on the same cores. Within a round each engine gets
its turn while the peers stand still, so that a noisy neighbour meets all of them; medians over the rounds are compared,
over the quiet rounds where there are any. A ratio above 1 means that MoonLang is better. The result file is written
anew after every round; a case or an engine that fails is recorded as failed and leaves the others alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import engines
import random_checkpoints
from cpu.cases import CASES, WARM_UP
from cpu.noise import Neighbours
from cpu.table import OURS, rows, shown
from load import run

HERE = Path(__file__).parent
FAILURES = (RuntimeError, OSError, ValueError)  # what `load.run` and `engines.serving` raise
STARTS = 3  # of our own server, which starts quickly: its median counts


@dataclasses.dataclass
class Engine:
    """An engine under test on one checkpoint. figures: by case, a dict per round; failures: by case."""

    name: str
    start_s: list[float] = dataclasses.field(default_factory=list)
    beyond_mb: float | None = None
    figures: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Peer:
    """shapes: the checkpoints that it serves, all when empty."""

    name: str
    command: str
    shapes: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Peer:
        """NAME=COMMAND or NAME@E,S=COMMAND."""
        name, separator, command = text.partition("=")
        if not separator or not command:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
        name, _, shapes = name.partition("@")
        return cls(name, command, tuple(shapes.split(",")) if shapes else ())


class Group:
    """The cases that the same servers answer: those of one checkpoint, or of one with other options of MoonLang."""

    def __init__(self, shape: str, cases: list[str], commands: Mapping[str, str], folder: Path) -> None:
        self.shape = shape
        self.cases = cases
        self.engines = {name: Engine(name) for name in commands}
        self._commands = commands
        self._folder = folder
        self._model = random_checkpoints.make(shape, folder)
        self._servers: dict[str, engines.Server] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Group:
        for name in self._commands:
            engine = self.engines[name]
            try:
                self._start(engine)
            except FAILURES as error:
                _fail(engine, "start", error)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.resume()
        self._stack.close()

    def round(self, number: int) -> None:
        """Every case once on every engine, with prompts of its own; each time another engine begins."""
        for case in self.cases:
            names = list(self._servers)
            turn = number % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                self._turn(self.engines[name], self._servers[name], case, number)

    def _turn(self, engine: Engine, server: engines.Server, case: str, number: int) -> None:
        if case in engine.failures:
            return
        server.resume()
        watch = Neighbours()
        try:
            work = dataclasses.replace(CASES[case].load, seed=number)
            figures = run("127.0.0.1", server.port, "bench", work)
            row = dataclasses.asdict(figures) | {"noise": round(watch.share(), 4)}
            engine.figures.setdefault(case, []).append(row)
        except FAILURES as error:
            _fail(engine, case, error)
        self._rest(engine, server)

    def _start(self, engine: Engine) -> None:
        log = self._folder / f"{self.shape}-{engine.name}.log"
        command = self._commands[engine.name]
        for _ in range(STARTS - 1 if engine.name == OURS else 0):
            with engines.serving(command, self._model, log) as server:
                engine.start_s.append(server.start_s)
        with ExitStack() as starting:  # ends a server that does not get through the warm-up
            server = starting.enter_context(engines.serving(command, self._model, log))
            engine.start_s.append(server.start_s)
            for work in WARM_UP:
                run("127.0.0.1", server.port, "bench", work)
            self._stack.push(starting.pop_all())
        cached = sum(work.requests * (work.input_len + work.output_len) for work in WARM_UP)
        expected = random_checkpoints.weight_bytes(self._model) + cached * random_checkpoints.kv_bytes(self.shape)
        engine.beyond_mb = server.memory_mb() - expected / 1e6
        self._servers[engine.name] = server
        self._rest(engine, server)

    def _rest(self, engine: Engine, server: engines.Server) -> None:
        """Ours and its variants take no time when idle; of a peer nobody knows."""
        if not self._own(engine.name):
            server.pause()

    def _own(self, name: str) -> bool:
        return name == OURS or any(name in CASES[case].options for case in self.cases)


def _fail(engine: Engine, what: str, error: Exception) -> None:
    engine.failures[what] = f"{type(error).__name__}: {error}"[:500]
    print(f"{engine.name} {what}: {engine.failures[what]}", file=sys.stderr, flush=True)


def groups(chosen: Iterable[str], ours: str, peers: Iterable[Peer], folder: Path) -> Iterable[Group]:
    """In the order of the cases; peers do not take part where MoonLang is compared with itself."""
    together: dict[tuple[str, str], list[str]] = {}
    for name in chosen:
        together.setdefault((CASES[name].shape, str(CASES[name].options)), []).append(name)
    for (shape, _), cases in together.items():
        options: Mapping[str, str] = CASES[cases[0]].options
        others = {name: f"{ours} {option}" for name, option in options.items()}
        if not options:
            others = {peer.name: peer.command for peer in peers if not peer.shapes or shape in peer.shapes}
        yield Group(shape, cases, {OURS: ours} | others, folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of: {', '.join(CASES)}")
    parser.add_argument(
        "--peer",
        action="append",
        type=Peer.parse,
        default=[],
        help="NAME=COMMAND with {model} and {port}; NAME@E,S=COMMAND takes part on these checkpoints only",
    )
    parser.add_argument("--moonlang", default=engines.MOONLANG, help="command of MoonLang")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the result file")
    args = parser.parse_args()
    unknown = [name for name in args.cases.split(",") if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    return args


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: no stopped server stays behind
    args.models.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"cpu-{datetime.now(UTC):%Y-%m-%dT%H%M}.json"
    commands = {OURS: args.moonlang} | {peer.name: peer.command for peer in args.peer}
    report: dict[str, Any] = {"machine": engines.machine(), "commands": commands, "table": [], "groups": []}
    for group in groups(args.cases.split(","), args.moonlang, args.peer, args.models):
        before = list(report["table"])
        report["groups"].append({})
        with group:
            for number in range(args.rounds):
                group.round(number)
                found = list(group.engines.values())
                report["table"] = before + rows(group.shape, {name: CASES[name] for name in group.cases}, found)
                report["groups"][-1] = {"shape": group.shape, "engines": [dataclasses.asdict(one) for one in found]}
                path.write_text(json.dumps(report, indent=1) + "\n")
                print(f"{group.shape}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for row in report["table"][len(before) :]:
            print(shown(row), flush=True)
    print(path)


if __name__ == "__main__":
    main()
