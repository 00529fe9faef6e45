"""Play a request trace in Mooncake's format: one JSON object a line with `timestamp` (ms), `input_length`,
`output_length` (tokens) and `hash_ids`, one per block of 512 tokens; an id names the block and all before it.

To be quick a block is played as `BLOCK` tokens, and lengths shrink with it. Equal ids become equal tokens, so the share
of blocks found in the cache is that of the real requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from moonlang.base.clock import NS_PER_MS
from moonlang.base.errors import ConfigError
from moonlang.core.sampling import SamplingParams
from moonlang.scheduler.settings import SchedulerConfig
from moonlang.sim.chain import ChainModel
from moonlang.sim.checkers.delivery import Delivery
from moonlang.sim.checkers.liveness import Liveness
from moonlang.sim.checkers.pages import Pages
from moonlang.sim.run import Outcome
from moonlang.sim.violation import Violation
from moonlang.sim.workload import EOS, FIRST_TOKEN, Case, Script
from moonlang.sim.world import World

TRACE_BLOCK = 512  # tokens of a block in the trace
BLOCK = 16  # tokens it is played with: one page
_VOCAB = 1000
_PLAN_NS = 5 * NS_PER_MS
_TOKEN_NS = 100_000


class TraceRequest(msgspec.Struct, frozen=True):
    """A line of the trace."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


def load(path: str, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` lines of a trace file; ConfigError when it is not one."""
    decoder = msgspec.json.Decoder(TraceRequest)
    try:
        with Path(path).open("rb") as file:
            return [decoder.decode(line) for _, line in zip(range(limit or 1 << 62), file, strict=False)]
    except OSError as error:
        raise ConfigError(f"The trace file cannot be read: {error}.") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a request trace: {error}.", hint="One JSON object a line.") from error


def play(requests: Sequence[TraceRequest], *, num_pages: int) -> tuple[Outcome, str]:
    """Run the trace in a world with `num_pages` pages of one block; the report is one line."""
    case = _case(requests, num_pages)
    world = World(case, (Delivery(), Liveness(), Pages()))
    failure = None
    try:
        world.run()
    except Violation as violation:
        failure = (violation.checker, violation.message)
    stats = world.scheduler.stats()
    report = (
        f"{len(requests)} requests, {stats.total_prompt_tokens} prompt tokens played, cache hit rate "
        f"{stats.cache_hit_rate:.1%} with {num_pages} pages (at most {ceiling(requests):.1%} with any number), "
        f"{stats.total_retractions} retractions, {world.steps} steps, {world.now_ns / 1e9:.1f} s of virtual time"
    )
    outcome = Outcome(
        seed=0, kind="plain", steps=world.steps, virtual_ns=world.now_ns, digest=world.digest, failure=failure
    )
    return outcome, report


def ceiling(requests: Sequence[TraceRequest]) -> float:
    """The share of prompt tokens that a cache without end would find, as they are played."""
    seen: dict[int, None] = {}
    total = hits = 0
    for request in requests:
        length = _played_length(request)
        full = (length - 1) // BLOCK  # the last token is always computed
        fresh = next((at for at, block in enumerate(request.hash_ids[:full]) if block not in seen), full)
        total += length
        hits += min(fresh, full) * BLOCK
        seen.update(dict.fromkeys(request.hash_ids))
    return hits / max(1, total)


def _case(requests: Sequence[TraceRequest], num_pages: int) -> Case:
    scripts = [_script(index, request) for index, request in enumerate(requests)]
    longest = max((len(s.prompt) + (s.sampling.max_new_tokens or 0) for s in scripts), default=1)
    config = SchedulerConfig(
        num_pages=num_pages,
        page_size=BLOCK,
        context_length=longest + 1,
        max_running=64,
        chunk_tokens=256,
        eos_token_ids=EOS,
    )
    model = ChainModel(vocab_size=_VOCAB, eos_token_ids=EOS, eos_per_mille=0)
    return Case(seed=0, config=config, model=model, scripts=tuple(scripts), plan_ns=_PLAN_NS, token_ns=_TOKEN_NS)


def _script(index: int, request: TraceRequest) -> Script:
    tokens = [token for block in request.hash_ids for token in _block_tokens(block)]
    return Script(
        index=index,
        rid=f"t{index:06d}",
        at_ns=request.timestamp * NS_PER_MS,
        prompt=tuple(tokens[: _played_length(request)]),
        sampling=SamplingParams(
            max_new_tokens=max(1, request.output_length * BLOCK // TRACE_BLOCK), ignore_eos=True, seed=index
        ),
        stream=False,
    )


def _played_length(request: TraceRequest) -> int:
    """Prompt tokens that stand for the request's."""
    return max(1, request.input_length * BLOCK // TRACE_BLOCK)


def _block_tokens(block: int) -> list[int]:
    """The tokens of a block: its id in base 998, then a pattern that depends on it."""
    base = _VOCAB - FIRST_TOKEN
    digits = [FIRST_TOKEN + block // base**i % base for i in range(4)]
    return digits + [FIRST_TOKEN + (block * 31 + i * 7) % base for i in range(BLOCK - len(digits))]
