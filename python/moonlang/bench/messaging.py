"""`moonlang bench messaging`: round trips and streams of every messaging backend on this machine, side by side.

Backends take turns within every round (A B A B ...), so that what else the machine does hits all of them; the table
shows medians over the rounds, and the ratio to plain pyzmq.
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
from pathlib import Path

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.errors import BugError, ConfigError, PeerError
from moonlang.bench.mailboxes import FAR, KINDS, Mailbox, one, pair
from moonlang.core.messages import Control, Reply
from moonlang.mooncake import lib

SIZES = (200, 64 << 10, 1 << 20)
YARDSTICK = "pyzmq"
_ROUND_TRIPS = {200: 400, 64 << 10: 150, 1 << 20: 30}
_STREAMED = {200: 8000, 64 << 10: 600, 1 << 20: 60}
_DEFAULT = "pyzmq,zmq,mooncake,inproc,zmq-tcp,mooncake-te"


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
        machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
        rounds = {
            kind: {size: list(map(dataclasses.asdict, rows)) for size, rows in by_size.items()}
            for kind, by_size in found.items()
        }
        args.out.write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1) + "\n")
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
            trip = rate = ""
            if YARDSTICK in found and kind != YARDSTICK:
                base = found[YARDSTICK][size]
                pairs = list(zip(by_size[size], base, strict=True))
                trip = f"{statistics.median(a.p50_us / b.p50_us for a, b in pairs):.2f}x"
                rate = f"{statistics.median(a.per_second / b.per_second for a, b in pairs):.2f}x"
            lines.append(
                f"{kind:<12}{size:>9}{row.p50_us:>9.1f}{row.p90_us:>9.1f}{row.p99_us:>9.1f}{trip:>8}"
                f"{row.per_second:>13,.0f}{rate:>8}{row.per_second * size / 1e6:>9,.0f}"
            )
    return lines


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
