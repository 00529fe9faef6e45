"""A closed-loop load client for OpenAI-compatible completion routes, thin enough to share two cores with the server.

Each of `concurrency` clients sends its next request when the previous one has ended: token-id prompts, greedy,
ignore_eos, fixed lengths, so that every engine does the same work.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send. Lengths in tokens; ids are drawn below `vocab`."""

    requests: int
    concurrency: int
    input_len: int
    output_len: int
    vocab: int = 1000
    stream: bool = True
    shared_prefix: int = 0
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        common = [rng.randrange(10, self.vocab) for _ in range(self.shared_prefix)]
        own = self.input_len - self.shared_prefix
        return [common + [rng.randrange(10, self.vocab) for _ in range(own)] for _ in range(self.requests)]


@dataclass(slots=True)
class Record:
    """Times of one request in seconds of the client's clock: start, one per streamed event with text, end."""

    start: float
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One round. Rates per second, times in milliseconds; ttft and tpot only when streaming."""

    tokens_per_s: float
    requests_per_s: float
    ttft_mean_ms: float | None = None
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    tpot_p50_ms: float | None = None
    latency_p50_ms: float
    token_p50_ms: float  # the latency shared out over the tokens of the answer


async def _request(host: str, port: int, body: bytes) -> Record:
    """Send one POST /v1/completions on a connection of its own and read the answer to its end."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    record = Record(time.perf_counter())
    writer.write(head.encode() + body)
    tail = b""
    status = (await reader.readline()).partition(b" ")[2][:3]
    while chunk := await reader.read(1 << 16):
        now = time.perf_counter()
        record.events += [now] * chunk.count(b'"text"')
        tail = tail[-512:] + chunk
    writer.close()
    if status != b"200":
        raise RuntimeError(f"HTTP {status.decode()}: {tail[-300:]!r}")
    record.end = time.perf_counter()
    at = tail.rindex(b'"completion_tokens":') + len(b'"completion_tokens":')
    record.tokens = int(tail[at : at + 12].split(b",")[0].split(b"}")[0])
    return record


async def _round(host: str, port: int, model: str, load: Load) -> tuple[float, list[Record]]:
    prompts = iter(load.prompts())
    records: list[Record] = []

    async def client() -> None:
        for prompt in prompts:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": load.output_len,
                "temperature": 0,
                "ignore_eos": True,
            }
            if load.stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            records.append(await _request(host, port, json.dumps(body).encode()))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    return time.perf_counter() - start, records


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def play(host: str, port: int, model: str, load: Load, timeout_s: float = 300) -> tuple[float, list[Record]]:
    """One round of `load`: how long it took, and its records in the order in which they ended.

    RuntimeError when a request is refused or an answer has the wrong length, ValueError when it is no answer at all,
    OSError when the connection breaks or nothing came in time.
    """
    elapsed, records = asyncio.run(asyncio.wait_for(_round(host, port, model, load), timeout_s))
    wrong = [record.tokens for record in records if record.tokens != load.output_len]
    if wrong:
        raise RuntimeError(f"{len(wrong)} answers have not {load.output_len} tokens but {wrong[:3]}")
    if load.stream and not all(record.events for record in records):
        raise RuntimeError("A stream ended without a chunk of text.")
    return elapsed, records


def run(host: str, port: int, model: str, load: Load, timeout_s: float = 300) -> Figures:
    """The figures of one round; raises what `play` does."""
    elapsed, records = play(host, port, model, load, timeout_s)
    latencies = [record.end - record.start for record in records]
    streamed: dict[str, float] = {}
    if load.stream:
        first = [record.events[0] - record.start for record in records]
        spans = [
            (record.events[-1] - record.events[0]) / (record.tokens - 1) for record in records if record.tokens > 1
        ]
        streamed = {
            "ttft_mean_ms": 1e3 * statistics.fmean(first),
            "ttft_p50_ms": 1e3 * statistics.median(first),
            "ttft_p99_ms": 1e3 * _percentile(first, 0.99),
            "tpot_p50_ms": 1e3 * statistics.median(spans) if spans else 0.0,
        }
    return Figures(
        tokens_per_s=sum(record.tokens for record in records) / elapsed,
        requests_per_s=len(records) / elapsed,
        latency_p50_ms=1e3 * statistics.median(latencies),
        token_p50_ms=1e3 * statistics.median(latencies) / load.output_len,
        **streamed,
    )
