"""What share of a server's processor time do the checksums of pages take?

    python benchmark/hicache/checksums.py [--shape S] [--requests 64] [--input 768]

One server with host memory and a Mooncake store in its own process answers random prompts, of which every page goes
down twice (`down`: to the host, copied with its checksum; to the store, summed), then forgets all it has in memory and
answers them again (`up`: every page comes from the store). The servers run with a clock around every checksum
(`clock/sitecustomize.py`; nothing of it is in the product), which counts processor time of its thread. Of a copy with
its checksum that part counts which it takes longer than the copy alone, measured here with pages of the same size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conversations
import engines
import load
import numpy as np
import overhead
import random_checkpoints

from moonlang.channels import moves

HERE = Path(__file__).parent
GOAL = 0.03
OUTPUT = 16  # tokens
PAGE = 16
CALIBRATION_BYTES, CALIBRATIONS = 64 << 20, 15


def spent(folder: Path) -> np.ndarray:
    """[4]: see clock/sitecustomize.py, of all processes together."""
    return sum((np.fromfile(path, np.float64) for path in folder.iterdir()), np.zeros(4))


def busy(server: engines.Server) -> float:
    """Seconds of processor time of all its processes so far."""
    return sum(sum(process.cpu_times()[:2]) for process in server.tree())


def extra(page_bytes: int) -> float:
    """Which part of a copy with its checksum is the checksum's: the rest is what the copy alone takes."""
    pages = 2 * max(1, CALIBRATION_BYTES // page_bytes)
    pool = np.frombuffer(mmap.mmap(-1, pages * page_bytes), np.uint8).reshape(pages, page_bytes)
    pool[:] = np.random.default_rng(1).integers(0, 256, pool.shape, np.uint8)
    first, half = pool.ctypes.data, pages // 2
    goals = [first + (half + page) * page_bytes for page in range(half)]
    parts = moves.page_parts([(first, page_bytes)], range(half), goals, out=True)
    times: dict[str, list[float]] = {"with": [], "alone": []}
    for _ in range(CALIBRATIONS):
        begin = time.thread_time()
        moves.move(parts)
        middle = time.thread_time()
        for page, goal in enumerate(goals):
            ctypes.memmove(goal, first + page * page_bytes, page_bytes)
        times["with"].append(middle - begin)
        times["alone"].append(time.thread_time() - middle)
    return max(0.0, 1 - min(times["alone"]) / min(times["with"]))


def phase(server: engines.Server, clock: Path, one: load.Load, part: float) -> dict[str, Any]:
    """Answer the prompts, until every page is where it is to go. part: see `extra`."""
    before, began, cpu = spent(clock), time.perf_counter(), busy(server)
    load.play("127.0.0.1", server.port, "bench", one)
    conversations.settle(server.port)
    seconds, cpu = time.perf_counter() - began, busy(server) - cpu
    alone_s, copies_s, alone_bytes, copied_bytes = (spent(clock) - before).tolist()
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "alone_s": alone_s,
        "copies_s": copies_s,
        "alone_gb": alone_bytes / 1e9,
        "copied_gb": copied_bytes / 1e9,
        "share": (alone_s + part * copies_s) / cpu,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=random_checkpoints.SHAPES, help="of a model of random weights")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--pool", type=int, default=16384, help="tokens of the device pool")
    parser.add_argument("--segment", default="4gb", help="memory of the store, in the engine's process")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "hicache_checksums.json")
    args = parser.parse_args()
    model = random_checkpoints.make(args.shape, args.models)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    one = load.Load(
        requests=args.requests, concurrency=args.concurrency, input_len=args.input, output_len=OUTPUT, vocab=vocab
    )
    found: dict[str, dict[str, Any]] = {}
    part = extra(random_checkpoints.kv_bytes(args.shape) * PAGE)
    with tempfile.TemporaryDirectory() as name, overhead.attached("healthy", Path(name), args) as (flags, _):
        clock = Path(name) / "clock"
        clock.mkdir()
        os.environ["CHECKSUM_CLOCK"] = str(clock)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "clock"), os.environ.get("PYTHONPATH", "")])
        limits = f"--max-running-requests {args.concurrency} --max-total-tokens {args.pool}"
        command = f"{engines.MOONLANG} --enable-hierarchical-cache --hicache-size 4 {limits} {flags}"
        with engines.serving(command, model, Path(name) / "server.log") as server:
            for way in ("down", "up"):
                found[way] = row = phase(server, clock, one, part)
                print(
                    f"{way:5} {row['cpu_s']:.1f} s of processor time, {row['alone_s']:.3f} s in checksums "
                    f"({row['alone_gb']:.2f} GB) and {row['copies_s']:.3f} s in copies with them "
                    f"({row['copied_gb']:.2f} GB), {part:.0%} of which is theirs: {row['share']:.2%} "
                    f"({'reached' if row['share'] <= GOAL else 'MISSED'} {GOAL:.0%})",
                    flush=True,
                )
                overhead.flush(server.port)
    keys = ("shape", "requests", "concurrency", "input")
    report = {"machine": engines.machine(), "load": {key: getattr(args, key) for key in keys}}
    report |= {"checksum_part_of_copies": part, "phases": found}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
