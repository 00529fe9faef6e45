"""What does a store cost that never helps: healthy, dead, paused, slow or lying?

    python benchmark/hicache/overhead.py [--shape S] [--rounds 12] [--requests 32] [--states healthy dead ...]

Two servers with pages in host memory, without and with a store below, answer the same random prompts in turns, a round
each; nothing is ever shared between prompts. Printed, per state of the store: throughput, and the median and P99 of the
time to the first token, with over without. Each is of all requests of all rounds together: the P99 of one round is its
slowest request. In brackets the interval that holds 95 % of the ratios when rounds are drawn again and again, with
replacement and in pairs (bootstrap); a goal is missed for sure only where all of it is on the wrong side. `healthy`
(memory in the engine's process), `service` (memory in a process of its own, reached through TCP), `dead` (master
killed) and `paused` (master stopped) are the Mooncake store; `slow` (every call takes --delay seconds) and `lying`
(every page that is read is damaged) are a directory behind test/support/moody_store.py; `lying` repeats prompts: only
who finds something can be lied to.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conversations
import engines
import load
import random_checkpoints
import services

HERE = Path(__file__).parent
SUPPORT = HERE.parents[1] / "test" / "support"
STATES = ("healthy", "service", "dead", "paused", "slow", "lying")
OURS = ("healthy", "service")  # throughput counts; in the others the time to the first token
OUTPUT = 16  # tokens
RESAMPLES = 2000
SETTLE_S = 2.0
THROUGHPUT, TTFT_P99 = 0.97, 1.05  # the goals


@dataclass(frozen=True, kw_only=True)
class Round:
    """seconds: that the requests took together; ttft_ms: of each."""

    seconds: float
    ttft_ms: list[float]


def flags(backend: str, extra: dict[str, Any]) -> str:
    text = json.dumps(extra).replace("{", "{{").replace("}", "}}")
    return f"--hicache-storage-backend {backend} --hicache-storage-backend-extra-config '{text}'"


@contextmanager
def attached(state: str, folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, services.Store | None]]:
    """Flags of a server whose store is to be in this state, and the store if it is Mooncake's."""
    if state not in ("slow", "lying"):
        segment = args.segment if state == "healthy" else 0
        with services.store(folder) as store:
            extra = {"master_server_address": store.address, "protocol": "tcp", "global_segment_size": segment}
            yield flags("mooncake", extra), store
        return
    mood = folder / "mood.json"
    mood.write_text(json.dumps({"delay_s": args.delay} if state == "slow" else {"flip": 1.0}))
    extra = {"module_path": "moody_store", "class_name": "MoodyStore", "directory": str(folder), "mood": str(mood)}
    yield flags("dynamic", extra), None


def compare(state: str, folder: Path, args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """Both servers in turns: the rounds of both, and the median ratios, with over without."""
    limits = f"--max-running-requests {args.concurrency} --max-total-tokens {args.pool}"
    base = f"{engines.MOONLANG} --enable-hierarchical-cache {limits}"
    found: dict[str, list[Round]] = {"without": [], "with": []}
    with (
        attached(state, folder, args) as (store_flags, store),
        engines.serving(base, args.model_path, folder / "without.log") as without,
        engines.serving(f"{base} {store_flags}", args.model_path, folder / "with.log") as with_store,
    ):
        ports = {"without": without.port, "with": with_store.port}
        _round(ports, found, args, vocab, 0)  # rates are learnt, code and memory are warm
        if store is not None and state not in OURS:
            os.kill(store.master.pid, signal.SIGKILL if state == "dead" else signal.SIGSTOP)
        found = {name: [] for name in found}
        for i in range(1, args.rounds + 1):
            if state == "lying":
                for port in ports.values():
                    flush(port)
            _round(ports, found, args, vocab, 0 if state == "lying" else i, turn=i)
    pairs = list(zip(found["without"], found["with"], strict=True))
    rng = random.Random(1)
    drawn = [ratios(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)]
    interval = {key: _middle([each[key] for each in drawn]) for key in drawn[0]}
    rows = {name: [dataclasses.asdict(one) for one in rounds] for name, rounds in found.items()}
    return {"ratios": ratios(pairs), "interval": interval, **rows}


def ratios(pairs: list[tuple[Round, Round]]) -> dict[str, float]:
    """With over without, of all rounds together."""
    without, with_store = zip(*pairs, strict=True)
    return {
        "tokens_per_s": sum(one.seconds for one in without) / sum(one.seconds for one in with_store),
        **{
            f"ttft_p{percent}_ms": _ttft(with_store, percent / 100) / _ttft(without, percent / 100)
            for percent in (50, 99)
        },
    }


def _ttft(rounds: Sequence[Round], share: float) -> float:
    times = sorted(time for one in rounds for time in one.ttft_ms)
    return times[min(len(times) - 1, int(share * len(times)))]


def _middle(values: list[float]) -> tuple[float, float]:
    """What holds 95 % of them."""
    values = sorted(values)
    return values[int(0.025 * len(values))], values[int(0.975 * len(values))]


def _round(
    ports: dict[str, int],
    found: dict[str, list[Round]],
    args: argparse.Namespace,
    vocab: int,
    seed: int,
    turn: int = 0,
) -> None:
    """The same prompts for both; who begins changes from turn to turn."""
    one = load.Load(
        requests=args.requests,
        concurrency=args.concurrency,
        input_len=args.input,
        output_len=OUTPUT,
        vocab=vocab,
        seed=seed,
    )
    for name in sorted(ports, reverse=bool(turn % 2)):
        elapsed, records = load.play("127.0.0.1", ports[name], "bench", one)
        times = [round(1e3 * (record.events[0] - record.start), 2) for record in records]
        found[name].append(Round(seconds=elapsed, ttft_ms=times))
        _settle(ports[name])


def _settle(port: int) -> None:
    """What is still on its way down would be done in the other server's turn. A store that hangs is not waited for."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and conversations.tiers(port)["queued_pages"]:
        time.sleep(0.05)


def flush(port: int) -> None:
    """Forget what is in the device pool and in host memory."""
    urllib.request.urlopen(f"http://127.0.0.1:{port}/flush_cache?timeout=30", data=b"", timeout=60).close()


def verdict(state: str, row: dict[str, Any]) -> str:
    found = row["ratios"]
    if state in OURS:
        return f"throughput {'reached' if found['tokens_per_s'] >= THROUGHPUT else 'MISSED'} {THROUGHPUT:g}"
    return f"TTFT p99 {'reached' if found['ttft_p99_ms'] <= TTFT_P99 else 'MISSED'} {TTFT_P99:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S", choices=random_checkpoints.SHAPES, help="of a model of random weights")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--model-path", type=Path, help="a model instead of --shape")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--pool", type=int, default=16384, help="tokens of the device pool")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds of every call of the slow store")
    parser.add_argument("--segment", default="1gb", help="memory of the healthy store, in the engine's process")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "hicache_overhead.json")
    args = parser.parse_args()
    args.model_path = args.model_path or random_checkpoints.make(args.shape, args.models)
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(SUPPORT)])
    found: dict[str, dict[str, Any]] = {}
    begin = time.monotonic()
    for state in args.states:
        with tempfile.TemporaryDirectory() as name:
            found[state] = row = compare(state, Path(name), args, vocab)
        parts = [
            f"{label} {row['ratios'][key]:.3f}x [{row['interval'][key][0]:.3f} {row['interval'][key][1]:.3f}]"
            for label, key in (("throughput", "tokens_per_s"), ("TTFT p50", "ttft_p50_ms"), ("p99", "ttft_p99_ms"))
        ]
        print(f"{state:8}", *parts, verdict(state, row), flush=True)
    report = {
        "machine": engines.machine(),
        "load": {key: getattr(args, key) for key in ("shape", "requests", "concurrency", "input", "rounds")},
        "seconds": round(time.monotonic() - begin),
        "states": found,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
