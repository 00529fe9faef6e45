"""Treat a running server badly: good requests, hang-ups and nonsense, all at once. Prints one JSON object.

    python benchmark/abuse.py --url http://127.0.0.1:30000 --requests 1000 --concurrency 64 --seed 0

Exit status 1 when a request got an answer that it should not get, or when the server does not come back to rest:
nothing running, no page leased, every page free or cached. With --pid its memory is reported too (PSS of the process
tree).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

REST_S = 60.0  # how long the server may take to come to rest
BIG = 10_000_000

Sample = Callable[["Abuse"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Bad:
    """A request that must be refused with one of these statuses, and with a message."""

    name: str
    path: str
    content: Callable[[], bytes]
    statuses: tuple[int, ...] = (400,)
    method: str = "POST"
    content_type: str = "application/json"


def native(**body: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(body).encode()


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BAD = (
    Bad("empty body", "/generate", lambda: b""),
    Bad("broken JSON", "/generate", lambda: b'{"text": "a"'),
    Bad("broken JSON", CHAT, lambda: b'{"messages": [}'),
    Bad("not UTF-8", "/generate", lambda: b'{"text": "\xff"}'),
    Bad("not a number", "/generate", lambda: b'{"text": "a", "priority": NaN}'),
    Bad("a list", TEXT, lambda: b"[1, 2]"),
    Bad("deep nesting", "/generate", lambda: b'{"text": ' + b"[" * 100_000),
    Bad("huge integer", "/generate", lambda: b'{"input_ids": [' + b"9" * 5000 + b"]}"),
    Bad("large integer", "/generate", lambda: b'{"input_ids": [' + b"9" * 40 + b"]}"),
    Bad("10 MB prompt", "/generate", lambda: json.dumps({"text": "word " * (BIG // 5)}).encode(), (400, 413)),
    Bad("10 MB prompt", TEXT, lambda: json.dumps({"prompt": "word " * (BIG // 5)}).encode(), (400, 413)),
    Bad("20 MB body", "/generate", lambda: b" " * (2 * BIG), (413,)),
    Bad("wrong type", "/generate", native(text=5)),
    Bad("wrong type", "/generate", native(text="a", sampling_params="x")),
    Bad("wrong type", "/generate", native(text="a", sampling_params={"temperature": "hot"})),
    Bad("wrong type", CHAT, native(messages="hello")),
    Bad("wrong type", CHAT, native(messages=[{"role": 5, "content": {}}])),
    Bad("wrong type", TEXT, native(prompt={"a": 1})),
    Bad("unknown parameter", "/generate", native(text="a", sampling_params={"temprature": 1})),
    Bad("out of range", "/generate", native(text="a", sampling_params={"top_p": 7})),
    Bad("out of range", "/generate", native(input_ids=[2**31])),
    Bad("out of range", TEXT, native(prompt="a", logit_bias={"99999999": 1})),
    Bad("too many samples", "/generate", native(text="a", sampling_params={"n": 10**9})),
    Bad("context overflow", "/generate", native(input_ids=[5] * 500_000)),
    Bad("context overflow", TEXT, native(prompt="a", max_tokens=10**8)),
    Bad("broken schema", "/generate", native(text="a", sampling_params={"json_schema": "{"})),
    Bad("broken regex", "/generate", native(text="a", sampling_params={"regex": "("})),
    Bad("broken grammar", "/generate", native(text="a", sampling_params={"ebnf": "what is this"})),
    Bad("no prompt", "/generate", native()),
    Bad("no messages", CHAT, native(messages=[])),
    Bad("content type", CHAT, native(messages=[]), content_type="text/plain"),
    Bad("no such path", "/generate/this", native(), (404,)),
    Bad("wrong method", "/generate", lambda: b"", (405,), method="GET"),
)


@dataclass
class Abuse:
    """One run. failures: what should not have happened; done: how many requests of each kind ended as they should."""

    url: str
    random: random.Random
    http: httpx.AsyncClient
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def params(self, tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": tokens, "temperature": self.random.choice((0, 1)), "ignore_eos": True}

    def prompt(self) -> str:
        shared = "Once upon a time there was a little dog who lived by the sea. " * self.random.randrange(6)
        return shared + f"Number {self.random.randrange(1000)}"

    def expect(self, name: str, good: bool, text: str) -> None:
        if good:
            self.done[name] += 1
        else:
            self.failures.append(f"{name}: {text[:300]}")


async def whole(abuse: Abuse) -> None:
    tokens = abuse.random.randrange(1, 40)
    body = {"text": abuse.prompt(), "sampling_params": abuse.params(tokens), "surprise": {"ignored": True}}
    response = await abuse.http.post("/generate", json=body)
    good = response.status_code == 200 and len(response.json()["output_ids"]) == tokens
    abuse.expect("whole", good, response.text)


async def streamed(abuse: Abuse) -> None:
    body = {"messages": [{"role": "user", "content": abuse.prompt()}], "max_tokens": 24, "stream": True}
    async with abuse.http.stream("POST", CHAT, json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    abuse.expect("streamed", response.status_code == 200 and lines[-1] == "data: [DONE]", str(lines[-1:]))


async def batched(abuse: Abuse) -> None:
    body = {"prompt": [abuse.prompt() for _ in range(3)], "max_tokens": 12, "n": 2}
    response = await abuse.http.post(TEXT, json=body)
    abuse.expect("batched", response.status_code == 200 and len(response.json()["choices"]) == 6, response.text)


async def left_while_streaming(abuse: Abuse) -> None:
    body = {"text": abuse.prompt(), "sampling_params": abuse.params(1000), "stream": True}
    chunks = abuse.random.randrange(4)
    async with abuse.http.stream("POST", "/generate", json=body) as response:
        async for _ in response.aiter_lines():
            if not chunks:
                break
            chunks -= 1
    abuse.expect("left while streaming", response.status_code == 200, str(response.status_code))


async def left_while_waiting(abuse: Abuse) -> None:
    body = {"text": [abuse.prompt(), abuse.prompt()], "sampling_params": abuse.params(1000)}
    try:
        await asyncio.wait_for(abuse.http.post("/generate", json=body), abuse.random.uniform(0.01, 0.3))
    except TimeoutError:
        abuse.expect("left while waiting", True, "")
    else:
        abuse.expect("answered before leaving", True, "")


async def aborted(abuse: Abuse) -> None:
    rid = f"abuse-{abuse.random.getrandbits(64):x}"
    body = {"text": abuse.prompt(), "sampling_params": abuse.params(1000), "rid": rid}
    asked = asyncio.ensure_future(abuse.http.post("/generate", json=body))
    await asyncio.sleep(abuse.random.uniform(0, 0.1))
    while not asked.done():
        await abuse.http.post("/abort_request", json={"rid": rid})
        await asyncio.wait([asked], timeout=0.2)
    response = asked.result()
    reason = response.json()["meta_info"]["finish_reason"]["type"] if response.status_code == 200 else ""
    abuse.expect("aborted", reason in ("abort", "length"), response.text)


async def half_a_request(abuse: Abuse) -> None:
    """Bytes by hand: a body that never ends, or no HTTP at all."""
    where = urlsplit(abuse.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
    writer.write(abuse.random.choice((head, b"\0\1\2\3 nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n")))
    await writer.drain()
    with contextlib.suppress(TimeoutError, ConnectionError):  # no answer is owed
        await asyncio.wait_for(reader.read(1000), 0.05)
    writer.close()
    abuse.expect("half a request", True, "")


async def bad(abuse: Abuse) -> None:
    case = abuse.random.choice(BAD)
    headers = {"content-type": case.content_type}
    response = await abuse.http.request(case.method, case.path, content=case.content(), headers=headers)
    clear = len(response.text) > 10
    text = f"{response.status_code} {response.text}"
    abuse.expect(f"bad: {case.name}", response.status_code in case.statuses and clear, text)


SAMPLES: tuple[tuple[int, Sample], ...] = (
    (20, whole),
    (15, streamed),
    (5, batched),
    (12, left_while_streaming),
    (8, left_while_waiting),
    (5, aborted),
    (5, half_a_request),
    (30, bad),
)


async def run(url: str, requests: int, concurrency: int, seed: int, pid: int | None) -> dict[str, Any]:
    """The whole treatment; see the module's docstring for the result."""
    source = random.Random(seed)
    limits = httpx.Limits(max_connections=2 * concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        abuse = Abuse(url, source, http)
        memory_before = tree_mb(pid)
        weights = [weight for weight, _ in SAMPLES]
        queue = source.choices([sample for _, sample in SAMPLES], weights, k=requests)

        async def worker() -> None:
            while queue:
                sample = queue.pop()
                try:
                    await sample(abuse)
                except (httpx.HTTPError, ConnectionError, ValueError, KeyError) as error:
                    abuse.failures.append(f"{sample.__name__}: {error!r}")

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        load = await rest(http)
    pages_back = load["used_tokens"] == 0 and load["free_tokens"] + load["cached_tokens"] == load["max_total_tokens"]
    if not pages_back or load["num_running"] or load["num_waiting"]:
        abuse.failures.append(f"the server did not come to rest: {load}")
    return {
        "requests": requests,
        "concurrency": concurrency,
        "seed": seed,
        "done": dict(sorted(abuse.done.items())),
        "failures": abuse.failures,
        "load": load,
        "memory_mb": [memory_before, tree_mb(pid)],
    }


async def rest(http: httpx.AsyncClient) -> dict[str, Any]:
    """The scheduler's numbers once nothing runs any more, or after REST_S."""
    for _ in range(int(REST_S / 0.1)):
        load = (await http.get("/server_info")).json()["internal_states"][0]["load"]
        if load["num_running"] + load["num_waiting"] + load["num_grammar"] + load["used_tokens"] == 0:
            return load
        await asyncio.sleep(0.1)
    return load


def tree_mb(pid: int | None) -> float | None:
    """Proportional memory of a process and its children."""
    if pid is None:
        return None
    root = psutil.Process(pid)
    return round(sum(p.memory_full_info().pss for p in (root, *root.children(recursive=True))) / 1e6, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process")
    args = parser.parse_args()
    result = asyncio.run(run(args.url, args.requests, args.concurrency, args.seed, args.pid))
    print(json.dumps(result, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
