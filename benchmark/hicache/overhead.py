"""What does a store cost that never helps: healthy, dead, paused, slow or lying?

    python benchmark/hicache/overhead.py --model-path FOLDER [--rounds 5] [--requests 48] [--states healthy dead ...]

Two servers, without and with a store, answer the same random prompts in turns, a round each; nothing is ever shared
between prompts. Printed, per state of the store: throughput and P99 of the time to the first token, with over without.
`healthy`, `dead` (master killed) and `paused` (master stopped) are the Mooncake store; `slow` (every call takes
--delay seconds) and `lying` (every page that is read is damaged) are a directory behind test/support/moody_store.py;
`lying` repeats its prompts, since only who finds something can be lied to.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engines
import load
import services

HERE = Path(__file__).parent
SUPPORT = HERE.parents[1] / "test" / "support"
STATES = ("healthy", "dead", "paused", "slow", "lying")
OUTPUT = 16  # tokens


def flags(backend: str, extra: dict[str, Any]) -> str:
    text = json.dumps(extra).replace("{", "{{").replace("}", "}}")
    store = f"--hicache-storage-backend {backend} --hicache-storage-backend-extra-config '{text}'"
    return f"--enable-hierarchical-cache {store}"


@contextmanager
def attached(state: str, folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, services.Store | None]]:
    """Flags of a server whose store is to be in this state, and the store if it is Mooncake's."""
    if state in ("healthy", "dead", "paused"):
        with services.store(folder) as store:
            extra = {"master_server_address": store.address, "protocol": "tcp", "global_segment_size": args.segment}
            yield flags("mooncake", extra), store
        return
    mood = folder / "mood.json"
    mood.write_text(json.dumps({"delay_s": args.delay} if state == "slow" else {"flip": 1.0}))
    extra = {"module_path": "moody_store", "class_name": "MoodyStore", "directory": str(folder), "mood": str(mood)}
    yield flags("dynamic", extra), None


def compare(state: str, folder: Path, args: argparse.Namespace, vocab: int) -> dict[str, float]:
    """Both servers in turns; medians over rounds, with over without."""
    base = f"{engines.MOONLANG} --max-running-requests {args.concurrency} --max-total-tokens {args.pool}"
    found: dict[str, list[load.Figures]] = {"without": [], "with": []}
    with (
        attached(state, folder, args) as (store_flags, store),
        engines.serving(base, args.model_path, folder / "without.log") as without,
        engines.serving(f"{base} {store_flags}", args.model_path, folder / "with.log") as with_store,
    ):
        ports = {"without": without.port, "with": with_store.port}
        _round(ports, found, args, vocab, 0)  # rates are learnt, code and memory are warm
        if store is not None and state != "healthy":
            os.kill(store.master.pid, signal.SIGKILL if state == "dead" else signal.SIGSTOP)
        found = {name: [] for name in found}
        for i in range(1, args.rounds + 1):
            if state == "lying":
                _flush(ports)
            _round(ports, found, args, vocab, 0 if state == "lying" else i)
    medians = {
        (name, key): statistics.median(getattr(figures, key) for figures in rounds)
        for name, rounds in found.items()
        for key in ("tokens_per_s", "requests_per_s", "ttft_p50_ms", "ttft_p99_ms")
    }
    ratios = {key: medians["with", key] / medians["without", key] for _, key in list(medians)[:4]}
    return ratios | {f"{key} {name}": value for (name, key), value in medians.items()}


def _round(
    ports: dict[str, int], found: dict[str, list[load.Figures]], args: argparse.Namespace, vocab: int, seed: int
) -> None:
    """The same prompts for both; who begins changes from round to round."""
    one = load.Load(
        requests=args.requests,
        concurrency=args.concurrency,
        input_len=args.input,
        output_len=OUTPUT,
        vocab=vocab,
        seed=seed,
    )
    for name in sorted(ports, reverse=bool(seed % 2)):
        found[name].append(load.run("127.0.0.1", ports[name], "bench", one))


def _flush(ports: dict[str, int]) -> None:
    for port in ports.values():
        urllib.request.urlopen(f"http://127.0.0.1:{port}/flush_cache?timeout=30", data=b"").close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--pool", type=int, default=16384, help="tokens of the device pool")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds of every call of the slow store")
    parser.add_argument("--segment", default="0", help="memory that the server contributes; 0: pages go to a service")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "hicache_overhead.json")
    args = parser.parse_args()
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(SUPPORT)])
    found: dict[str, dict[str, float]] = {}
    for state in args.states:
        with tempfile.TemporaryDirectory() as name:
            found[state] = row = compare(state, Path(name), args, vocab)
        print(
            f"{state:8} throughput {row['tokens_per_s']:.3f}x  TTFT p50 {row['ttft_p50_ms']:.3f}x "
            f"p99 {row['ttft_p99_ms']:.3f}x  ({row['ttft_p99_ms without']:.1f} -> {row['ttft_p99_ms with']:.1f} ms)",
            flush=True,
        )
    args.out.write_text(json.dumps({"machine": engines.machine(), "states": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
