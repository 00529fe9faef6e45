"""The shapes of server that have to answer alike, each as a command line for `engines.serving`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import httpx
from hicache.services import store

MOONLANG = f"{sys.executable} -m moonlang"
SERVE = f"{engines.MOONLANG} --random-seed 1 --constrained-json-disable-any-whitespace"
UP = f"{MOONLANG} up --plain --port {{port}} --model-path {{model}} --served-model-name bench"
SEED = "--random-seed 1 --constrained-json-disable-any-whitespace"
SMALL = "--max-total-tokens 2048"
STORE = "--hicache-storage-prefetch-policy wait_complete --hicache-storage-backend-extra-config"
MIXTURE = "--tp-size 2 --moe-a2a-backend mooncake"
MOVING = "--enable-eplb --ep-num-redundant-experts 2 --eplb-rebalance-num-iterations 25"
COPIES = f"{MIXTURE} --dp-size 2 --enable-dp-attention"


@dataclass(frozen=True, slots=True)
class Shape:
    """serving: yields, while it serves, the public URL and those of all servers that hold pages. mixture: it is for a
    mixture of experts only."""

    serving: Callable[[Path, Path, str], Iterator[Sequence[str]]]
    flags: str = ""
    mixture: bool = False


def quoted(extra: dict[str, Any]) -> str:
    """JSON as a word of a command that `engines.serving` formats."""
    return shlex.quote(json.dumps(extra).replace("{", "{{").replace("}", "}}"))


def alone(model: Path, logs: Path, flags: str) -> Iterator[Sequence[str]]:
    with engines.serving(f"{SERVE} {flags}", model, logs / "server.log") as server:
        yield (f"http://127.0.0.1:{server.port}",) * 2


def cached(model: Path, logs: Path, flags: str) -> Iterator[Sequence[str]]:
    """A small device pool, a host pool, and below them a folder."""
    folder = quoted({"directory": str(logs / "pages"), "prefetch_threshold": 32})
    below = f"--enable-hierarchical-cache --hicache-storage-backend file {STORE} {folder} --hicache-ratio 1.5"
    yield from alone(model, logs, f"{SMALL} {below} {flags}")


def stored(model: Path, logs: Path, flags: str) -> Iterator[Sequence[str]]:
    """The same with Mooncake's store."""
    with store(logs) as services:
        extra = {"master_server_address": services.address, "protocol": "tcp", "global_segment_size": "256mb"}
        text = quoted(extra | {"prefetch_threshold": 32})
        below = f"--enable-hierarchical-cache --hicache-storage-backend mooncake {STORE} {text}"
        yield from alone(model, logs, f"{SMALL} {below} {flags}")


def pair(model: Path, logs: Path, flags: str) -> Iterator[Sequence[str]]:
    """flags: of both servers; after a bar those of prefill, after another one those of decode."""
    both, first, second = (*flags.split("|"), "", "")[:3]
    with ExitStack() as stack:
        port, urls = engines.free_port(), {}
        for role, more in (("prefill", first), ("decode", second)):
            mode = f"--disaggregation-mode {role} --disaggregation-bootstrap-port {port}"
            command = f"{SERVE} {mode} {both} {more}"
            server = stack.enter_context(engines.serving(command, model, logs / f"{role}.log"))
            urls[role] = f"http://127.0.0.1:{server.port}"
        ways = f"--prefill {urls['prefill']} {port} --decode {urls['decode']}"
        command = f"{sys.executable} -m moonlang.router --pd-disaggregation --host 127.0.0.1 --port {{port}} {ways}"
        front = stack.enter_context(engines.serving(command, model, logs / "router.log"))
        yield f"http://127.0.0.1:{front.port}", *urls.values()


def cluster(model: Path, logs: Path, flags: str) -> Iterator[Sequence[str]]:
    command = f"{UP} --log-dir {logs} {SEED} {flags}"
    with engines.serving(command, model, logs / "up.log") as server:
        public = f"http://127.0.0.1:{server.port}"
        workers = httpx.get(f"{public}/workers").json()["workers"]
        yield public, *(worker["url"] for worker in workers)


SHAPES: dict[str, Shape] = {
    "plain": Shape(alone),
    "small": Shape(alone, f"{SMALL} --max-running-requests 24 --schedule-conservativeness 0.05"),
    "chunks": Shape(alone, "--chunked-prefill-size 64 --page-size 16 --disable-overlap-schedule"),
    "tp2": Shape(alone, "--tp-size 2"),
    "dp2": Shape(alone, "--dp-size 2 --load-balance-method total_tokens"),
    "pp2": Shape(alone, "--pp-size 2"),
    "dp2-pp2": Shape(alone, "--dp-size 2 --pp-size 2"),
    "pp2-cached": Shape(cached, "--pp-size 2 --hicache-write-policy write_back"),
    "pair-pp2-1": Shape(pair, f"{SMALL}|--pp-size 2"),
    "pair-1-pp2": Shape(pair, f"{SMALL}||--pp-size 2"),
    "pair-pp2-tp2": Shape(pair, f"{SMALL}|--pp-size 2 --tp-size 2|--tp-size 2"),
    "workers": Shape(alone, "--tokenizer-worker-num 2 --detokenizer-worker-num 2 --messaging-backend mooncake"),
    "write_through": Shape(cached, "--hicache-write-policy write_through"),
    "write_back": Shape(cached, "--hicache-write-policy write_back"),
    "selective": Shape(cached, "--hicache-write-policy write_through_selective --tp-size 2"),
    "store": Shape(stored),
    "store-tp2": Shape(stored, "--tp-size 2 --hicache-write-policy write_back"),
    "pair": Shape(pair, SMALL),
    "pair-tcp": Shape(pair, f"{SMALL} --disaggregation-transfer-backend mooncake_tcp"),
    "pair-1-2": Shape(pair, f"{SMALL}||--tp-size 2"),
    "pair-dp2": Shape(pair, f"{SMALL}|--dp-size 2|--dp-size 2"),
    "up": Shape(cluster, f"--prefill 1 --decode 1 --store 256mb {SMALL}"),
    "up-2": Shape(cluster, f"--replicas 2 {SMALL}"),
    "ep2": Shape(alone, MIXTURE, mixture=True),
    "ep2-overlap": Shape(alone, f"{MIXTURE} --enable-two-batch-overlap", mixture=True),
    "ep2-copies": Shape(alone, COPIES, mixture=True),
    "ep2-cached": Shape(cached, MIXTURE, mixture=True),
    "ep2-pp2": Shape(alone, f"{MIXTURE} --pp-size 2 --enable-two-batch-overlap", mixture=True),
    "ep2-pair": Shape(pair, f"{SMALL}||{MIXTURE}", mixture=True),
    "ep2-moving": Shape(alone, f"{MIXTURE} {MOVING}", mixture=True),
    "ep2-copies-cached": Shape(cached, COPIES, mixture=True),
    "ep2-copies-pair": Shape(pair, f"{SMALL}|{MIXTURE}|{COPIES}", mixture=True),
    "ep2-copies-moving": Shape(alone, f"{COPIES} {MOVING}", mixture=True),
    "ep4-copies": Shape(alone, f"{COPIES} --tp-size 4", mixture=True),
}


@contextmanager
def serving(name: str, model: Path, logs: Path) -> Iterator[Sequence[str]]:
    """Its public URL, then those of all servers that hold pages. "plain" is what the others are compared with."""
    shape = SHAPES[name]
    logs.mkdir(parents=True)
    yield from shape.serving(model, logs, shape.flags)
