"""`moonlang bench messaging`: round trips and streams of every messaging backend on this machine, side by side.

Backends take turns within every round (A B A B ...), so that what else the machine does hits all of them; the table
shows medians over the rounds, and the ratio to plain pyzmq: over ipc:// within a host, over TCP between hosts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import socket
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moonlang.base.clock import NS_PER_S, monotonic_ns, wall_s
from moonlang.base.errors import BugError, ConfigError, PeerError
from moonlang.bench.mailboxes import BETWEEN_HOSTS, FAR, KINDS, Mailbox, one, pair
from moonlang.core.messages import Control, Reply
from moonlang.mooncake import lib

SIZES = (200, 64 << 10, 1 << 20)
_ROUND_TRIPS = {200: 400, 64 << 10: 150, 1 << 20: 30}
_STREAMED = {200: 30_000, 64 << 10: 2000, 1 << 20: 150}
_DEFAULT = "pyzmq,zmq,mooncake,inproc,pyzmq-tcp,zmq-tcp,mooncake-te"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One backend, one size, one round. Times of a round trip in microseconds."""

    p50_us: float
    p90_us: float
    p99_us: float
    per_second: float


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="moonlang bench messaging", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backends", default=_DEFAULT, help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of text in a message")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of messages")
    parser.add_argument("--out", type=Path, help="write all rounds as JSON")
    args = parser.parse_args(argv)
    kinds = args.backends.split(",")
    if wrong := set(kinds) - KINDS.keys():
        raise ConfigError(f"Unknown backends: {', '.join(sorted(wrong))}.", hint=f"Choose from: {', '.join(KINDS)}.")
    if "mooncake-te" in kinds and (fix := lib.how_to_get()):
        print(f"Without mooncake-te. {fix}\n")
        kinds.remove("mooncake-te")
    sizes = [int(size) for size in args.sizes.split(",")]
    found = measure(kinds, sizes, args.rounds, args.scale)
    print("\n".join(table(found)))
    if args.out is not None:
        args.out.write_text(json.dumps(report(found), indent=1) + "\n")
    return 0


Found = dict[str, dict[int, list[Figures]]]


def measure(kinds: Sequence[str], sizes: Sequence[int], rounds: int, scale: float = 1.0) -> Found:
    """`rounds` interleaved rounds after a warm-up."""
    found: Found = {kind: {size: [] for size in sizes} for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="moonlang-bench-") as folder, ExitStack() as stack:
        boxes = {kind: stack.enter_context(pair(kind, Path(folder), _free_port)) for kind in kinds}
        for number in range(rounds + 1):
            for size in sizes:
                for kind, box in boxes.items():
                    figures = _round(box, size, scale if number else scale / 4)
                    if number:
                        found[kind][size].append(figures)
    return found


def table(found: Found) -> list[str]:
    """Medians over the rounds."""
    lines = [f"{'backend':<12}{'bytes':>9}{'p50 us':>9}{'p90':>9}{'p99':>9}{'':>8}{'messages/s':>13}{'':>8}{'MB/s':>9}"]
    for size in next(iter(found.values())):
        for kind, by_size in found.items():
            row = _median(by_size[size])
            ratios = {name: f"{ratio:.2f}x" for name, ratio in _ratios(found, kind, size).items()}
            trip, rate = ratios.get("trip_ratio", ""), ratios.get("rate_ratio", "")
            lines.append(
                f"{kind:<12}{size:>9}{row.p50_us:>9.1f}{row.p90_us:>9.1f}{row.p99_us:>9.1f}{trip:>8}"
                f"{row.per_second:>13,.0f}{rate:>8}{row.per_second * size / 1e6:>9,.0f}"
            )
    return lines


def report(found: Found) -> dict[str, Any]:
    """What a reader needs to compare with another machine: where and when, medians, ratios to pyzmq, all rounds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    machine = {
        "date": datetime.fromtimestamp(wall_s(), UTC).isoformat(timespec="seconds"),
        "cpu": next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("msgspec", "pyzmq")},
        "mooncake": lib.version(),
    }
    rounds = {
        kind: {size: [dataclasses.asdict(row) for row in rows] for size, rows in by_size.items()}
        for kind, by_size in found.items()
    }
    medians = {
        kind: {size: dataclasses.asdict(_median(rows)) | _ratios(found, kind, size) for size, rows in by_size.items()}
        for kind, by_size in found.items()
    }
    return {"machine": machine, "medians": medians, "rounds": rounds}


def _ratios(found: Found, kind: str, size: int) -> dict[str, float]:
    """To the yardstick, as medians of the ratios round by round; none when it was not measured, or is this one."""
    yardstick = "pyzmq-tcp" if kind in BETWEEN_HOSTS else "pyzmq"
    if yardstick not in found or kind == yardstick:
        return {}
    pairs = list(zip(found[kind][size], found[yardstick][size], strict=True))
    return {
        "trip_ratio": round(statistics.median(a.p50_us / b.p50_us for a, b in pairs), 3),
        "rate_ratio": round(statistics.median(a.per_second / b.per_second for a, b in pairs), 3),
    }


def _median(rows: Sequence[Figures]) -> Figures:
    values = {
        field.name: statistics.median(getattr(row, field.name) for row in rows) for field in dataclasses.fields(Figures)
    }
    return Figures(**values)


def _round(box: Mailbox, size: int, scale: float) -> Figures:
    trips = max(8, int(_count(_ROUND_TRIPS, size) * scale))
    streamed = max(8, int(_count(_STREAMED, size) * scale))
    echo, swallow = Reply(0, True, "x" * size), Reply(1, True, "x" * size)
    taken: list[int] = []
    for _ in range(trips):
        begun = monotonic_ns()
        box.send(FAR, echo)
        one(box)
        taken.append(monotonic_ns() - begun)
    begun = monotonic_ns()
    for _ in range(streamed):
        while not _sent(box, swallow):
            pass
    box.send(FAR, Control(0, "ping"))
    answer = one(box)
    seconds = (monotonic_ns() - begun) / NS_PER_S
    if not isinstance(answer, Reply) or answer.id != streamed:
        raise BugError(f"{streamed} messages were sent, the answer is {answer}.")
    taken.sort()
    p50, p90, p99 = (taken[len(taken) * share // 100] / 1000 for share in (50, 90, 99))
    return Figures(p50_us=p50, p90_us=p90, p99_us=p99, per_second=streamed / seconds)


def _sent(box: Mailbox, body: Reply) -> bool:
    """A stream is as fast as its reader: a full inbox is waited for."""
    try:
        box.send(FAR, body)
    except PeerError:
        return False
    return True


def _count(counts: dict[int, int], size: int) -> int:
    """The number for the next listed size."""
    return counts[min((listed for listed in counts if listed >= size), default=max(counts))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
