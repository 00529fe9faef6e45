"""What do the lower tiers bring to conversations that do not fit into the device pool?

    python benchmark/hicache/conversations.py --model-path FOLDER [--conversations 16] [--turns 6] [--store mooncake]

Conversations with one system prompt take turns, so that each finds its pages evicted when it comes again: the device
pool holds a quarter of them. Measured: time to the first token with the device pool alone, with the host tier, and with
a shared store after a restart and on a second server that never saw the prompts. The store's memory is in a process of
its own, as it must be to survive the engine.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engines
import services

HERE = Path(__file__).parent
SYSTEM, USER, ANSWER = 512, 128, 16  # tokens


class Talk:
    """One conversation as token ids."""

    def __init__(self, system: list[int], rng: random.Random, vocab: int) -> None:
        self.ids = list(system)
        self._rng = rng
        self._vocab = vocab

    def say(self, port: int) -> tuple[float, int]:
        """One turn: (seconds to the first token, prompt tokens found in any tier)."""
        self.ids += [self._rng.randrange(10, self._vocab) for _ in range(USER)]
        seconds, answer, cached = ask(port, self.ids)
        self.ids += answer
        return seconds, cached


def ask(port: int, ids: list[int]) -> tuple[float, list[int], int]:
    """(seconds to the first token, output ids, cached tokens) of one greedy request."""
    sampling = {"max_new_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"input_ids": ids, "sampling_params": sampling, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    begin = time.monotonic()
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    first, last = 0.0, {}
    for line in reply:
        if line.startswith(b"data: {"):
            first = first or time.monotonic() - begin
            last = json.loads(line[6:])
    connection.close()
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


def again(port: int, prompts: list[list[int]]) -> dict[str, Any]:
    """The same prompts on a server that has just started."""
    results = [ask(port, ids) for ids in prompts]
    return {
        "mean_ttft_s": statistics.mean(seconds for seconds, _, _ in results),
        "cached_tokens": sum(cached for _, _, cached in results),
        "prompt_tokens": sum(map(len, prompts)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "hicache_conversations.json")
    args = parser.parse_args()
    vocab = json.loads((args.model_path / "config.json").read_text())["vocab_size"]
    whole = SYSTEM + args.conversations * args.turns * (USER + ANSWER)
    base = f"{engines.MOONLANG} --max-total-tokens {whole // 4 // 16 * 16} --max-running-requests 4"
    host = f"{base} --enable-hierarchical-cache --hicache-size 4"
    found: dict[str, Any] = {}

    def talks() -> list[Talk]:
        rng = random.Random(11)
        system = [rng.randrange(10, vocab) for _ in range(SYSTEM)]
        return [Talk(system, random.Random(i), vocab) for i in range(args.conversations)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tier, command in (("device", base), ("host", host)):
            with engines.serving(command, args.model_path, folder / f"{tier}.log") as server:
                found[tier] = turns(server.port, talks(), args.turns)
        with services.store(folder) as store:
            extra = json.dumps({"master_server_address": store.address, "protocol": "tcp", "global_segment_size": 0})
            shared = f"{base} --enable-hierarchical-cache --hicache-storage-backend mooncake"
            shared += f" --hicache-storage-backend-extra-config '{extra.replace('{', '{{').replace('}', '}}')}'"
            with engines.serving(shared, args.model_path, folder / "store-1.log") as server:
                spoken = talks()
                found["store"] = turns(server.port, spoken, args.turns)
                time.sleep(3)  # the last pages are on their way
            prompts = [talk.ids for talk in spoken]
            with engines.serving(base, args.model_path, folder / "cold.log") as server:
                found["cold"] = again(server.port, prompts)
            with engines.serving(shared, args.model_path, folder / "store-2.log") as server:
                found["restarted"] = again(server.port, prompts)
                with engines.serving(shared, args.model_path, folder / "store-3.log") as second:
                    found["second server"] = again(second.port, prompts)
    for tier, row in found.items():
        print(f"{tier:14}", " ".join(f"{key}={value:.4g}" for key, value in row.items()))
    print(f"host over device: {found['device']['mean_ttft_s'] / found['host']['mean_ttft_s']:.2f}x")
    for name in ("restarted", "second server"):
        ratio = found["cold"]["mean_ttft_s"] / found[name]["mean_ttft_s"]
        print(
            f"{name} over cold: {ratio:.2f}x, {found[name]['cached_tokens'] / found[name]['prompt_tokens']:.1%} found"
        )
    args.out.write_text(json.dumps({"machine": engines.machine(), "tiers": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
