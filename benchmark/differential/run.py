"""Do all shapes of server answer random requests like the plain one, and that one like `transformers`?

    python benchmark/differential/run.py [--shapes tp2,pair] [--requests 200] [--seed 0] [--rounds 1] [--mixture]

Requests of all routes with all kinds of sampling, grammars, log probabilities, streams, beginnings that they share and
conversations go to a plain server one at a time, and to every other shape many at a time, between clients that leave
and aborts. Tokens, texts, log probabilities and reasons to stop must be equal to the last bit. With --mixture the model
is a random mixture of experts, without it the embedded one; --model-path names another one. Exit status 1 when an
answer differs, or a server does not come to rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from differential.asking import Chain, Maker, Request, StreamError, ask
from differential.shapes import SHAPES, serving

from moonlang.config.model_source import EMBEDDED_FOLDER
from moonlang.models.registry import specs

PASSES = 2  # each round is asked so often: then others have computed, kept and stored what a request begins with
REST_S = 60.0  # how long a server may take to come to rest
BUSY = ("num_running", "num_waiting", "num_grammar", "used_tokens")


@dataclass
class Round:
    """The requests of one seed and what the plain server answered to each turn of each chain."""

    chains: list[Chain]
    expected: list[list[Any]] = field(default_factory=list)

    def turn(self, chain: int, number: int) -> Request:
        """The first request, or one that goes on from what was said until then."""
        request = self.chains[chain].first
        if number == 0:
            return request
        said = [self.expected[chain][turn] for turn in range(number)]
        ids = list(request.body["input_ids"])
        for answer, more in zip(said, self.chains[chain].turns, strict=False):
            ids += answer["ids"] + more
        return Request(request.path, request.body | {"input_ids": ids})


async def reference(url: str, round_: Round) -> None:
    """Ask the plain server, one request after the other."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for index, chain in enumerate(round_.chains):
            round_.expected.append([])
            for number in range(len(chain.turns) + 1):
                request = round_.turn(index, number)
                answer = await ask(http, Request(request.path, request.body | {"stream": False}))
                round_.expected[index].append(answer)


async def compare(url: str, round_: Round, concurrency: int, seed: int) -> list[dict[str, Any]]:
    """Ask another one, many at a time; what differs."""
    rng, wrong = random.Random(seed), list[dict[str, Any]]()
    queue = rng.sample(range(len(round_.chains)), len(round_.chains))
    async with httpx.AsyncClient(
        base_url=url, timeout=120, limits=httpx.Limits(max_connections=2 * concurrency)
    ) as http:

        async def worker() -> None:
            while queue:
                index = queue.pop()
                for number, expected in enumerate(round_.expected[index]):
                    request = round_.turn(index, number)
                    try:
                        answer = await ask(http, request, rng.expovariate(8))
                    except (httpx.HTTPError, StreamError, ValueError, KeyError) as error:
                        answer = repr(error)
                    if not request.leaves and answer != expected:
                        wrong.append({"path": request.path, "body": request.body, "is": answer, "expected": expected})

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return wrong


async def at_rest(urls: Sequence[str]) -> str:
    """Empty once nothing runs any more and every page is free or cached; else what is still there."""
    async with httpx.AsyncClient(timeout=20) as http:
        for _ in range(int(REST_S / 0.2)):
            loads = [load for url in urls for load in await loads_of(http, url)]
            busy = [f"{key}={load[key]}" for load in loads for key in BUSY if load[key]]
            lost = [load for load in loads if load["free_tokens"] + load["cached_tokens"] != load["max_total_tokens"]]
            if not busy and not lost:
                return ""
            await asyncio.sleep(0.2)
        return f"{busy} {lost}"


async def loads_of(http: httpx.AsyncClient, url: str) -> list[dict[str, Any]]:
    states = (await http.get(f"{url}/server_info")).json()["internal_states"]
    return [state["load"] for state in states]


async def check(name: str, urls: Sequence[str], rounds: Sequence[Round], args: argparse.Namespace) -> list[Any]:
    """All rounds at one shape; what is wrong with it."""
    wrong: list[Any] = []
    for number, round_ in enumerate(rounds):
        for again in range(PASSES):
            wrong += await compare(urls[0], round_, args.concurrency, args.seed + number + again)
            if busy := await at_rest(urls[1:]):
                wrong.append({"not at rest": busy})
            await forget(urls[1:])
        print(f"{name:14} round {number}: {len(round_.chains)} chains, {len(wrong)} wrong so far", end=" ")
        print(await ways(urls[1:]), flush=True)
    return wrong


async def forget(urls: Sequence[str]) -> None:
    """Empty device and host memory: what comes next is computed, or from a store."""
    async with httpx.AsyncClient(timeout=60) as http:
        for url in urls:
            (await http.post(f"{url}/flush_cache", params={"timeout": 30})).raise_for_status()


async def ways(urls: Sequence[str]) -> str:
    """How much went another way than on the plain server."""
    async with httpx.AsyncClient(timeout=20) as http:
        loads = [load for url in urls for load in await loads_of(http, url)]
    found = {
        "retracted": sum(load["total_retractions"] for load in loads),
        "from host": sum(load["tiers"]["total_host_tokens"] for load in loads),
        "from store": sum(load["tiers"]["total_store_tokens"] for load in loads),
        "pairs": sum(load["pairs"]["total_moved"] for load in loads),
    }
    return ", ".join(f"{name}: {number}" for name, number in found.items() if number)


def mixture(folder: Path) -> Path:
    """A random mixture of experts with latents, which writes with the embedded model's tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = specs()["deepseek_v3"].tiny() | {"vocab_size": 1728, "eos_token_id": 2, "bos_token_id": 1}
    shape |= {"max_position_embeddings": 4096}
    torch.manual_seed(0)
    kinds = {key: shape.pop(key) for key in ("architectures", "model_type")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kinds["model_type"], **shape)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(kinds | shape | {"torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (EMBEDDED_FOLDER / name).exists():
            shutil.copy(EMBEDDED_FOLDER / name, folder)
    return folder


def prepare(model: Path, args: argparse.Namespace, logs: Path) -> list[Round]:
    """Draw the requests of all rounds and have the plain server answer them."""
    config = json.loads((model / "config.json").read_text())
    rounds = []
    with ExitStack() as stack:
        url = args.reference or stack.enter_context(serving("plain", model, logs / "reference"))[0]
        for number in range(args.rounds):
            maker = Maker(random.Random(args.seed + number), config["vocab_size"], config["max_position_embeddings"])
            rounds.append(Round(maker.chains(args.requests)))
            asyncio.run(reference(url, rounds[-1]))
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="some of the shapes, separated by commas; default: all that suit the model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--mixture", action="store_true")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--reference", help="URL of a plain server of this model that runs already")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this new folder")
    args = parser.parse_args()
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        logs = args.logs or Path(temporary) / "logs"
        model = args.model_path or (mixture(Path(temporary) / "model") if args.mixture else EMBEDDED_FOLDER)
        rounds = prepare(model, args, logs)
        names = args.shapes.split(",") if args.shapes else [n for n, s in SHAPES.items() if args.mixture >= s.mixture]
        for name in names:
            try:
                with serving(name, model, logs / name) as urls:
                    found[name] = asyncio.run(check(name, urls, rounds, args))
            except RuntimeError as error:  # it does not start
                found[name] = [str(error)]
                print(f"{name:14} {error}", flush=True)
    print(json.dumps({name: wrong[:5] for name, wrong in found.items() if wrong}, indent=1))
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
