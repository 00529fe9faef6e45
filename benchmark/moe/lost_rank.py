"""How long does a server pause that loses a rank under load, and are its answers those that it would have given?

    python benchmark/moe/lost_rank.py [--cases C,D] [--repeats N] [--model NAME | --folder FOLDER] [--out FILE]

A server with `--elastic-ep-backend mooncake` answers eight streams, some greedy and some drawn from seeds. In the midst
of them one of its processes is killed. `first` is the time from the signal to the first token that any stream hears
after the server has noticed, `all` the time until every stream that had not ended has heard another one. A stream
is right when it ends with the tokens that an undisturbed run gave. Exit status 1 when one is not.

`silent` stops the process (SIGSTOP) instead: it is waited for --dist-timeout (10 s) and half a minute more at most.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import engines  # noqa: E402
import random_checkpoints  # noqa: E402

STREAMS, TOKENS, PROMPT = 8, 256, 64
FLAGS = "--dtype bfloat16 --grammar-backend none --max-total-tokens 8000 --random-seed 1 --elastic-ep-backend mooncake"


@dataclass(frozen=True, slots=True)
class Case:
    """flags: of the server. victim: the role that is lost, how: by which signal."""

    flags: str
    victim: str
    how: signal.Signals = signal.SIGKILL


SHARED = "--enable-dp-attention --moe-a2a-backend mooncake"
CASES = {
    "tp 2 -> 1": Case("--tp-size 2 --moe-a2a-backend mooncake", "worker-1"),
    "tp 4 -> 2": Case("--tp-size 4 --moe-a2a-backend mooncake", "worker-1"),
    "shared experts 2 -> 1": Case(f"--tp-size 2 --dp-size 2 {SHARED}", "scheduler-1"),
    "shared experts 4 -> 3": Case(f"--tp-size 4 --dp-size 4 {SHARED}", "scheduler-2"),
    "shared experts 4 -> 3, the first": Case(f"--tp-size 4 --dp-size 4 {SHARED}", "scheduler"),
    "copies 2 -> 1": Case("--dp-size 2", "scheduler-1"),
    "silent, shared experts 4 -> 3": Case(
        f"--tp-size 4 --dp-size 4 {SHARED} --dist-timeout 10", "scheduler-2", signal.SIGSTOP
    ),
}


class Stream(threading.Thread):
    """One request and what it hears, and when."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self._port, self._number = port, number
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.ended = False
        self.start()

    def run(self) -> None:
        drawn = {"temperature": 0.8, "sampling_seed": self._number} if self._number % 2 else {"temperature": 0}
        body = {
            "input_ids": [2 + (self._number * 97 + at * 31) % 1000 for at in range(PROMPT)],
            "sampling_params": {**drawn, "max_new_tokens": TOKENS, "ignore_eos": True},
            "stream": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line.removeprefix(b"data: "))
                    self.times.append(time.monotonic())
                    self.tokens = chunk["output_ids"]
                    self.ended = chunk["meta_info"]["finish_reason"] is not None


def streams(port: int) -> list[Stream]:
    return [Stream(port, number) for number in range(STREAMS)]


def finished(running: list[Stream]) -> list[list[int]]:
    for stream in running:
        stream.join(180)
    return [stream.tokens if stream.ended else [] for stream in running]


def process_of(server: engines.Server, role: str) -> int:
    """Each role is started with the file of its job."""
    return next(one.pid for one in server.tree() if Path(one.cmdline()[-1]).stem == role)


def measure(case: Case, model: Path, log: Path) -> dict[str, Any]:
    """One server, one loss. Seconds."""
    with engines.serving(f"{engines.MOONLANG} {FLAGS} {case.flags}", model, log) as server:
        victim = process_of(server, case.victim)
        expected = finished(streams(server.port))
        running = streams(server.port)
        while not all(len(stream.tokens) > TOKENS // 4 for stream in running):
            time.sleep(0.001)
        os.kill(victim, case.how)
        killed = time.monotonic()
        right = sum(found == wanted for found, wanted in zip(finished(running), expected, strict=True))
        again = finished(streams(server.port)) == expected
    resumed = [_after_pause(stream.times, killed) for stream in running]
    return {"first_s": min(resumed), "all_s": max(resumed), "right": right, "right_afterwards": again}


def _after_pause(times: list[float], killed: float) -> float:
    """Seconds from the signal to the end of the longest silence of a stream that it interrupts."""
    before = max(time for time in times if time <= killed)
    after = [time for time in times if time > killed]
    gaps = [(late - early, late) for early, late in zip([before, *after], after, strict=False)]
    return max(gaps)[1] - killed if gaps else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(name for name in CASES if "," not in name), help="or 'all'")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="E", help="of random_checkpoints")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "moe_lost_rank.json")
    args = parser.parse_args()
    names = list(CASES) if args.cases == "all" else args.cases.split(",")
    model = random_checkpoints.make(args.model, args.folder)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    print(f"{'':34}{'first s':>10}{'all s':>10}{'right':>12}")
    for _ in range(args.repeats):
        for name in names:
            rows[name].append(measure(CASES[name], model, args.folder / "lost_rank.log"))
            _print(name, rows[name])
    args.out.write_text(json.dumps({"machine": engines.machine(), "model": args.model, "rows": rows}, indent=1) + "\n")
    right = all(row["right"] == STREAMS and row["right_afterwards"] for some in rows.values() for row in some)
    return 0 if right else 1


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    """Medians so far."""
    first, all_of_them = (statistics.median(row[key] for row in rows) for key in ("first_s", "all_s"))
    right = sum(row["right"] for row in rows)
    print(f"{name:34}{first:10.3f}{all_of_them:10.3f}{right:6} of {STREAMS * len(rows)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
