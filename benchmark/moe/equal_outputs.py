"""Do servers of every shape give the same answers, bit for bit?

    python benchmark/moe/equal_outputs.py [--models M,N] [--shapes S,T] [--a2a A,B] [--pairs none] [--out FILE]

Shapes are `ep E tp T`: experts on E ranks, the attention of a copy of the model on T of them; with more ranks than T
there are E / T copies (--enable-dp-attention). Experts are never cut: `--ep-size 1 --tp-size 2` has them on two ranks.
Each shape serves with every --moe-a2a-backend that it can have. Its tokens and log probabilities, cold and from its
cache, are compared with those of one rank; then it is the prefill half of a pair, and the decode half of another, in
which the other half is one rank, two copies of one rank, and two copies of two.

Checkpoints are tiny and random: this asks for bits, not for speed. Exit status 1 when an answer differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moonlang.models.registry import specs

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import engines  # noqa: E402

TORCH, MOONCAKE, NONE = "torch", "mooncake", "none"


@dataclass(frozen=True, slots=True)
class Shape:
    """Ranks of a server. copies: of the model, which share its experts."""

    flags: str
    copies: int = 1
    a2a: tuple[str, ...] = (NONE, TORCH, MOONCAKE)


APART = (TORCH, MOONCAKE)  # tokens have to travel
SHAPES = {
    "ep 1 tp 1": Shape(""),
    "ep 1 tp 2": Shape("--tp-size 2 --ep-size 1"),
    "ep 2 tp 1": Shape("--tp-size 2 --ep-size 2 --dp-size 2 --enable-dp-attention", 2, APART),
    "ep 2 tp 2": Shape("--tp-size 2 --ep-size 2"),
    "ep 4 tp 1": Shape("--tp-size 4 --ep-size 4 --dp-size 4 --enable-dp-attention", 4, APART),
    "ep 4 tp 2": Shape("--tp-size 4 --ep-size 4 --dp-size 2 --enable-dp-attention", 2, APART),
    "ep 4 tp 4": Shape("--tp-size 4 --ep-size 4"),
}
FEW = (("ep 1 tp 1", NONE), ("ep 2 tp 1", MOONCAKE), ("ep 4 tp 2", TORCH))
ALONE = ("ep 1 tp 1", NONE)
FLAGS = "--load-format dummy --dtype bfloat16 --skip-tokenizer-init --grammar-backend none --max-total-tokens 8000 "
FLAGS += "--random-seed 1 --chunked-prefill-size 64"
HOST = "127.0.0.1"

Kind = tuple[str, str]  # the name of a shape, and what carries tokens
Answer = tuple[Any, ...]


def bodies() -> list[dict[str, Any]]:
    """Short and long, greedy and drawn, with log probabilities of what was asked and of what was said."""
    rng = random.Random(7)
    asked = []
    for length, drawn in ((3, False), (70, True), (150, False), (33, True)):
        sampling = {"temperature": 0.8, "top_p": 0.9, "sampling_seed": length} if drawn else {"temperature": 0}
        asked.append(
            {
                "input_ids": [rng.randrange(2, 250) for _ in range(length)],
                "sampling_params": {**sampling, "max_new_tokens": 10, "ignore_eos": True},
                "return_logprob": True,
                "top_logprobs_num": 2,
            }
        )
    return asked


BODIES = bodies()


class Running:
    """A server that answers. bootstrap: the port where a prefill half is met."""

    def __init__(self, port: int, copies: int, bootstrap: int = 0) -> None:
        self.copies, self.bootstrap = copies, bootstrap
        self._url = f"http://{HOST}:{port}/generate"

    def ask(self, body: dict[str, Any]) -> Answer:
        request = urllib.request.Request(self._url, msgspec.json.encode(body), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            found = msgspec.json.decode(response.read())
        meta = found["meta_info"]
        return found["output_ids"], meta["output_token_logprobs"], meta["output_top_logprobs"]


@contextmanager
def serving(model: Path, kind: Kind, log: Path, more: str = "", bootstrap: int = 0) -> Iterator[Running]:
    shape, carrier = SHAPES[kind[0]], kind[1]
    command = f"{engines.MOONLANG} {FLAGS} {shape.flags} --moe-a2a-backend {carrier} {more}"
    with engines.serving(command, model, log) as server:
        yield Running(server.port, shape.copies, bootstrap)


def directly(server: Running) -> list[Answer]:
    """Every copy is asked everything, alone and with the others, so that others idle, and work at something else."""
    asked = [{**body, "routed_dp_rank": copy} for copy in range(server.copies) for body in BODIES]
    found = [server.ask(body) for body in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        return found + list(pool.map(server.ask, asked))


class Rooms:
    """A pair, asked as a router would."""

    def __init__(self) -> None:
        self._rooms = itertools.count(1)

    def ask(self, prefill: Running, decode: Running) -> list[Answer]:
        """So often that every copy of both halves has all of it at least once."""
        turns = prefill.copies * decode.copies
        asked = [
            {**body, "bootstrap_host": HOST, "bootstrap_port": prefill.bootstrap, "bootstrap_room": next(self._rooms)}
            for _ in range(turns)
            for body in BODIES
        ]
        with ThreadPoolExecutor(2 * len(asked)) as pool:
            first = [pool.submit(prefill.ask, body) for body in asked]
            found = list(pool.map(decode.ask, asked))
            for one in first:
                one.result()
        return found


def right(found: list[Answer], expected: list[Answer]) -> bool:
    """Whether answers, to all bodies in turn, are the expected ones."""
    return all(one == expected[number % len(expected)] for number, one in enumerate(found))


class Table:
    """What was compared, printed as it comes."""

    def __init__(self, folder: Path, transfer: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._folder, self._rooms = folder, Rooms()
        self._pair = f"--disaggregation-transfer-backend {transfer} --disaggregation-mode"

    def measure(self, name: str, kinds: list[Kind], others: list[Kind]) -> None:
        """All kinds by themselves, and in pairs with the others in both directions."""
        model = checkpoint(self._folder, name)
        with serving(model, ALONE, self._log(name, ALONE)) as server:
            expected = directly(server)[: len(BODIES)]
        for kind in kinds:
            begin = time.monotonic()
            with serving(model, kind, self._log(name, kind)) as server:
                self._add(name, "alone", kind, kind, right(directly(server), expected), begin)
        with ExitStack() as stack:
            decodes = [(kind, stack.enter_context(self._half(model, kind, "decode"))) for kind in others]
            for kind in kinds:
                with self._half(model, kind, "prefill") as prefill:
                    for other, decode in decodes:
                        self._compare(name, (kind, prefill), (other, decode), expected)
        with ExitStack() as stack:
            prefills = [(kind, stack.enter_context(self._half(model, kind, "prefill"))) for kind in others]
            for kind in (kind for kind in kinds if kind not in others):
                with self._half(model, kind, "decode") as decode:
                    for other, prefill in prefills:
                        self._compare(name, (other, prefill), (kind, decode), expected)

    def _compare(
        self, name: str, prefill: tuple[Kind, Running], decode: tuple[Kind, Running], expected: list[Answer]
    ) -> None:
        begin = time.monotonic()
        found = self._rooms.ask(prefill[1], decode[1])
        self._add(name, "pair", prefill[0], decode[0], right(found, expected), begin)

    @contextmanager
    def _half(self, model: Path, kind: Kind, role: str) -> Iterator[Running]:
        port = engines.free_port()
        more = f"{self._pair} {role} --disaggregation-bootstrap-port {port}"
        with serving(model, kind, self._log(role, kind), more, port) as server:
            yield server

    def _log(self, what: str, kind: Kind) -> Path:
        return self._folder / f"{what}-{'-'.join(kind).replace(' ', '')}.log"

    def _add(self, model: str, how: str, prefill: Kind, decode: Kind, equal: bool, begin: float) -> None:
        row = {"model": model, "how": how, "prefill": " ".join(prefill), "decode": " ".join(decode), "equal": equal}
        self.rows.append(row | {"seconds": round(time.monotonic() - begin, 1)})
        verdict = "equal" if equal else "DIFFERENT"
        between = row["prefill"] if how == "alone" else f"{row['prefill']:18} -> {row['decode']}"
        print(f"{model:12} {how:6} {between:42} {verdict}", flush=True)


def checkpoint(folder: Path, name: str) -> Path:
    """A folder with a config.json: weights are random."""
    made = folder / name
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text(json.dumps(specs()[name].tiny() | {"max_position_embeddings": 2048}))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="deepseek_v3,qwen3_moe")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--a2a", default=f"{NONE},{TORCH},{MOONCAKE}")
    parser.add_argument("--pairs", choices=("none", "few"), default="few")
    parser.add_argument("--transfer", default="mooncake", help="how pages of a pair travel")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "moonlang-equal", help="for logs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "equal_outputs.json")
    args = parser.parse_args()
    names, carriers = args.shapes.split(","), args.a2a.split(",")
    kinds = [(name, carrier) for name in names for carrier in SHAPES[name].a2a if carrier in carriers]
    others = list(FEW) if args.pairs == "few" else []
    args.folder.mkdir(parents=True, exist_ok=True)
    table = Table(args.folder, args.transfer)
    for model in args.models.split(","):
        table.measure(model, kinds, others)
    equal = sum(row["equal"] for row in table.rows)
    print(f"{equal} of {len(table.rows)} equal")
    args.out.write_text(json.dumps({"machine": engines.machine(), "rows": table.rows}, indent=1) + "\n")
    return 0 if equal == len(table.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
