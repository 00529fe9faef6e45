"""What do the lower tiers bring to conversations that do not fit into the device pool?

    python benchmark/hicache/conversations.py [--model-path FOLDER] [--conversations 16] [--turns 6]

Conversations with one system prompt take turns, so that each finds its pages evicted when it comes again: the device
pool holds a quarter of them. Measured: time to the first token of the turns that have a past, with the device pool
alone and with the host tier; and of the finished conversations on a server that has them not, on one that starts again
with a shared store, and on a second server that never saw them. The store's memory is in a process of its own, as it
must be to survive the engine. Every server must give the same answers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engines
import random_checkpoints
import services

HERE = Path(__file__).parent
SYSTEM = 512  # tokens that all conversations begin with
PAGE = 16
SETTLE_S = 60.0
GOALS = {"host": 3.0, "restarted": 3.0, "second server": 3.0, "kept": 0.95}


class Talk:
    """One conversation as token ids. user, answer: tokens per turn."""

    def __init__(self, system: Sequence[int], seed: int, args: argparse.Namespace, vocab: int) -> None:
        self.ids = list(system)
        self._rng = random.Random(seed)
        self._user, self._answer = args.user, args.answer
        self._vocab = vocab

    def say(self, port: int) -> tuple[float, int]:
        """One turn: (seconds to the first token, prompt tokens found in any tier)."""
        self.ids += [self._rng.randrange(10, self._vocab) for _ in range(self._user)]
        seconds, answer, cached = ask(port, self.ids, self._answer)
        self.ids += answer
        return seconds, cached


def ask(port: int, ids: list[int], length: int) -> tuple[float, list[int], int]:
    """(seconds to the first token, output ids, cached tokens) of one greedy request."""
    sampling = {"max_new_tokens": length, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"input_ids": ids, "sampling_params": sampling, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    begin = time.perf_counter()
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    first, last = 0.0, {}
    for line in reply:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - begin
            last = json.loads(line[6:])
    connection.close()
    if "output_ids" not in last:
        raise RuntimeError(f"HTTP {reply.status}, and no answer: {last}")
    return first, last["output_ids"], last["meta_info"]["cached_tokens"]


def turns(port: int, talks: list[Talk], count: int) -> dict[str, Any]:
    """Every conversation says `count` things, in turns; figures of those that have a past."""
    times, cached = [], 0
    for turn in range(count):
        for talk in talks:
            seconds, found = talk.say(port)
            if turn:
                times.append(seconds)
                cached += found
    return {"mean_ttft_s": statistics.mean(times), "cached_tokens": cached, "requests": len(times)}


def again(port: int, prompts: list[list[int]]) -> tuple[dict[str, Any], list[list[int]]]:
    """Finished conversations, each asked for one more token: figures, and the tokens."""
    results = [ask(port, ids, 1) for ids in prompts]
    figures = {
        "mean_ttft_s": statistics.mean(seconds for seconds, _, _ in results),
        "cached_tokens": sum(cached for _, _, cached in results),
        "requests": len(prompts),
    }
    return figures, [answer for _, answer, _ in results]


def settle(port: int) -> None:
    """Until every page that is on its way to the store has arrived; RuntimeError when that takes too long."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        if not tiers(port)["queued_pages"]:
            return
        time.sleep(0.1)
    raise RuntimeError(f"pages are still on their way to the store after {SETTLE_S:g} s: {tiers(port)}")


def tiers(port: int) -> dict[str, Any]:
    """What the server's tiers have done so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=60) as reply:
        return json.load(reply)["internal_states"][0]["load"]["tiers"]


def flags(address: str) -> str:
    """Of a server on the store whose master is there."""
    extra = json.dumps({"master_server_address": address, "protocol": "tcp", "global_segment_size": 0})
    text = extra.replace("{", "{{").replace("}", "}}")
    return f"--hicache-storage-backend mooncake --hicache-storage-backend-extra-config '{text}'"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Figures by server. RuntimeError when two servers answer differently."""
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    longest = SYSTEM + args.turns * (args.user + args.answer)
    whole = SYSTEM + args.conversations * (longest - SYSTEM)
    pool = max(whole // 4, longest + 4 * PAGE) // PAGE * PAGE  # one conversation must fit
    base = f"{engines.MOONLANG} --max-total-tokens {pool} --max-running-requests 4"
    host = f"{base} --enable-hierarchical-cache --hicache-size 4"
    rng = random.Random(11)
    system = [rng.randrange(10, vocab) for _ in range(SYSTEM)]
    found: dict[str, dict[str, Any]] = {}
    spoken: list[list[int]] = []

    def note(name: str, figures: dict[str, Any], port: int | None = None) -> None:
        """port: of a server that has a store."""
        print(f"{name:14}", " ".join(f"{key}={value:.4g}" for key, value in figures.items()), flush=True)
        found[name] = figures
        if port is not None:
            found[name]["tiers"] = done = {key: value for key, value in tiers(port).items() if value}
            print(" " * 14, json.dumps(done), flush=True)

    for name, command in (("device", base), ("host", host)):
        talks = [Talk(system, seed, args, vocab) for seed in range(args.conversations)]
        with engines.serving(command, args.model_path, folder / f"{name}.log") as server:
            note(name, turns(server.port, talks, args.turns))
        said = [talk.ids for talk in talks]
        if spoken and said != spoken:
            raise RuntimeError("with the host tier the conversations went otherwise")
        spoken = said
    with services.store(folder) as store:
        shared = f"{host} {flags(store.address)}"
        with engines.serving(shared, args.model_path, folder / "store-1.log") as server:
            cold, answers = again(server.port, spoken)
            note("cold", cold)
            warm, _ = again(server.port, spoken)
            settle(server.port)
            note("warm", warm, server.port)
        with ExitStack() as running:  # the second starts while the first is up
            for name in ("restarted", "second server"):
                server = running.enter_context(engines.serving(shared, args.model_path, folder / f"{name}.log"))
                figures, same = again(server.port, spoken)
                note(name, figures, server.port)
                if same != answers:
                    raise RuntimeError(f"{name}: pages from the store gave other answers")
    return found


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Speed-ups, and the share of the former hits that a restart has kept."""
    ratios = {"host": found["device"]["mean_ttft_s"] / found["host"]["mean_ttft_s"]}
    for name in ("restarted", "second server"):
        ratios[name] = found["cold"]["mean_ttft_s"] / found[name]["mean_ttft_s"]
    kept = min(found[name]["cached_tokens"] for name in ("restarted", "second server"))
    return ratios | {"kept": kept / found["warm"]["cached_tokens"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="default: random weights in the shape of Qwen3-0.6B, bfloat16")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-bench")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--user", type=int, default=96, help="tokens that a user says in a turn")
    parser.add_argument("--answer", type=int, default=8, help="tokens that the model says")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "hicache_conversations.json")
    args = parser.parse_args()
    args.model_path = args.model_path or random_checkpoints.make("M", args.models)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        found = measure(args, Path(name))
    ratios = verdicts(found)
    for name, ratio in ratios.items():
        print(f"{name:14} {ratio:6.2f}  {'reached' if ratio >= GOALS[name] else 'MISSED'} {GOALS[name]:g}")
    report = {
        "machine": engines.machine(),
        "load": {key: getattr(args, key) for key in ("conversations", "turns", "user", "answer")},
        "seconds": round(time.monotonic() - begin),
        "tiers": found,
        "ratios": ratios,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
