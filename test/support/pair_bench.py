"""A prefill and a decode scheduler between which a test carries messages, pages and time by hand.

The model is made of bytes: the KV of a position is drawn from the chain of tokens up to it, differs in every layer,
head and dimension, and is checked wherever a plan builds on it. So a page that is missing, stale or sliced wrongly
shows at once, and the right answer follows from the prompt alone (`answer`).
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.pairing import (
    Heard,
    KvCard,
    Linked,
    Lost,
    PairEvent,
    PairMessage,
    PeerSpec,
    Push,
    TransferOp,
    Unreachable,
)
from moonlang.core.plan import Row, RowResult, StepPlan, StepResult, TokenLogprob
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import PairingConfig, SchedulerConfig

Bytes = NDArray[np.uint8]

EOS = 99
MS = 1_000_000
PATIENCE_NS = 10_000 * MS
SCHEMA = KvSchema(num_layers=4, num_kv_heads=4, head_dim=2, page_size=4, dtype="uint8", itemsize=1, fingerprint="tiny")


def chain(tokens: list[int]) -> list[bytes]:
    """What each position knows of the tokens up to it."""
    links = [b""]
    for token in tokens:
        links.append(hashlib.sha256(links[-1] + token.to_bytes(4)).digest())
    return links[1:]


@lru_cache(maxsize=1 << 14)
def position_kv(link: bytes) -> Bytes:
    """KV of a position: [L, 2, H, D]."""
    shape = (SCHEMA.num_layers, 2, SCHEMA.num_kv_heads, SCHEMA.head_dim)
    stream = hashlib.shake_128(link).digest(int(np.prod(shape)))
    return np.frombuffer(stream, np.uint8).reshape(shape)


def next_token(link: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(link + seed.to_bytes(8)).digest()[:4]) % 97


def answer(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """What one server by itself would say."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(chain(tokens)[-1], seed))
    return tokens[len(prompt) :]


def spec(room: int) -> PeerSpec:
    return PeerSpec("p", 8998, room)


def prompt(length: int, start: int = 100) -> list[int]:
    return list(range(start, start + length))


@dataclass
class Tenant:
    """What the executor knows of a slot."""

    prompt_len: int
    tokens: list[int]
    sampling: SamplingParams
    logprobs: bool
    table: list[int] = field(default_factory=list)


class Half:
    """One instance: its scheduler, pools (one per rank) and everything that leaves it, to be carried by the test."""

    def __init__(self, mode: Literal["prefill", "decode"], instance: str, ranks: int = 1, **fields: Any) -> None:
        pairing = {k: fields.pop(k) for k in PairingConfig.__dataclass_fields__ if k in fields}
        settings: dict[str, Any] = {"num_pages": 65, "page_size": 4, "context_length": 200, "eos_token_ids": (EOS,)}
        settings |= {"depth": 1} | fields
        heads = SCHEMA.num_kv_heads // ranks
        schema = msgspec.structs.replace(SCHEMA, num_kv_heads=heads, page_size=settings["page_size"])
        regions = tuple(
            KvRegion(
                address=0,
                stride=schema.page_bytes,
                num_pages=settings["num_pages"],
                schema=schema,
                first_head=r * heads,
            )
            for r in range(ranks)
        )
        self.card = KvCard(
            instance=instance,
            backend="hand",
            host="",
            regions=regions,
            sessions=("",) * ranks,
            handles=("",) * ranks,
        )
        pairing = {"push_least_bytes": 0, "push_span_bytes": 0, "patience_ns": PATIENCE_NS} | pairing
        self.scheduler = Scheduler(
            SchedulerConfig(pairing=PairingConfig(mode=mode, card=self.card, **pairing), **settings)
        )
        shape = (settings["num_pages"], schema.num_layers, 2, heads, schema.page_size, schema.head_dim)
        self.pools = [np.full(shape, 0xEE, np.uint8) for _ in regions]
        self.page_size = schema.page_size
        self.instance = instance
        self.now_ns = 0
        self.plans: deque[StepPlan] = deque()
        self.out: list[tuple[str, PairMessage]] = []
        self.ops: dict[int, TransferOp] = {}
        self.cancelled: list[int] = []
        self.opened: list[PeerSpec] = []
        self.deltas: dict[str, list[TokenDelta]] = {}
        self._tenants: dict[int, Tenant] = {}

    # ---- in

    def add(self, rid: str, tokens: list[int], room: int | None, count: int = 4, **fields: Any) -> None:
        sampling = fields.pop("sampling", None) or SamplingParams(max_new_tokens=count)
        peer = None if room is None else spec(room)
        message = Generate(rid, list(tokens), sampling, stream=True, peer=peer, **fields)
        self._take(self.scheduler.add(message, self.now_ns))
        self.step()

    def abort(self, rid: str) -> None:
        self._take(self.scheduler.abort(rid, exact=True))
        self.step()

    def compiled(self, spec: GrammarSpec) -> None:
        self._take(self.scheduler.grammar_ready(spec, "", self.now_ns))
        self.step()

    def hear(self, event: PairEvent) -> None:
        self._take(self.scheduler.peers.heard(event, self.now_ns))
        self.step()

    def lose(self, other: Half, fate: Literal["silent", "gone"]) -> None:
        self.hear(Lost(other.instance, fate))

    def wait(self, ns: int) -> None:
        self.now_ns += ns
        self.step()

    def step(self) -> None:
        """What the role does at the end of every step; the ledgers are checked."""
        self._take(self.scheduler.expire(self.now_ns))
        while (plan := self.scheduler.plan(self.now_ns)) is not None:
            self.plans.append(plan)
        mail = self.scheduler.peers.mail
        self.opened += [peer for peer, _ in mail.opens()]
        self.ops |= dict(mail.transfers())
        self.cancelled += mail.cancels()
        self.out += mail.outgoing()
        self.scheduler.check()

    def _take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.deltas.setdefault(delta.rid, []).append(delta)

    # ---- out

    def tokens(self, rid: str) -> list[int]:
        return [token for delta in self.deltas.get(rid, []) for token in delta.tokens]

    def end(self, rid: str) -> tuple[str, int] | None:
        """(kind, status) of the one end of a request; None while it lives."""
        ends = [delta.finish for delta in self.deltas.get(rid, []) if delta.finish is not None]
        assert len(ends) <= 1
        return (ends[0].kind, ends[0].status) if ends else None

    def said(self, kind: type) -> list[Any]:
        return [body for _, body in self.out if isinstance(body, kind)]

    # ---- the executor

    def run_plan(self, between: Callable[[], None] = lambda: None, error: str = "") -> None:
        """Run the oldest plan, layer by layer; `between` is called wherever the plan asks for a report. error: its rows
        fail with it."""
        plan = self.plans.popleft()
        for start in plan.starts:
            wants = start.logprob is not None
            self._tenants[start.slot] = Tenant(start.prompt_len, list(start.tokens), start.sampling, wants)
        written = [self._kv(row) for row in plan.rows]
        for layer in range(SCHEMA.num_layers):
            for kv in written:
                for page, offset, value in kv:
                    self._write(page, offset, layer, value)
            if plan.report_layers and (layer + 1) % plan.report_layers == 0:
                self.scheduler.peers.progress(plan.plan_id, layer + 1)
                self.step()
                between()
        rows = [RowResult(row.slot, row.epoch, error=error) if error else self._sample(row) for row in plan.rows]
        result = StepResult(plan.plan_id, tuple(rows))
        self._take(self.scheduler.commit(result, self.now_ns))
        self.step()

    def _kv(self, row: Row) -> list[tuple[int, int, Bytes]]:
        """(page, offset, KV) of the row's positions; what comes before them must be right."""
        tenant = self._tenants[row.slot]
        tenant.table[row.page_at : row.page_at + len(row.pages)] = row.pages
        known = tenant.tokens[row.start : row.start + row.length]
        assert list(row.tokens or known) == known
        links = chain(tenant.tokens[: row.start + row.length])
        for at in range(row.start):
            page, offset = tenant.table[at // self.page_size], at % self.page_size
            if not np.array_equal(self._read(page, offset), position_kv(links[at])):
                # A row of a request that has ended may read pages that belong to others by now.
                assert not self._is_live(row), f"position {at} of {row} has wrong KV"
        return [
            (tenant.table[at // self.page_size], at % self.page_size, position_kv(links[at]))
            for at in range(row.start, row.start + row.length)
        ]

    def _is_live(self, row: Row) -> bool:
        request = self.scheduler._roster.running.get(row.slot)
        return request is not None and request.epoch == row.epoch

    def _sample(self, row: Row) -> RowResult:
        tenant = self._tenants[row.slot]
        if not row.sample:
            return RowResult(row.slot, row.epoch)
        token = next_token(chain(tenant.tokens)[-1], tenant.sampling.seed)
        tenant.tokens.append(token)
        output = (TokenLogprob(token, -float(len(tenant.tokens))),) if tenant.logprobs else ()
        return RowResult(row.slot, row.epoch, (token,), output)

    def _write(self, page: int, offset: int, layer: int, value: Bytes) -> None:
        for region, pool in zip(self.card.regions, self.pools, strict=True):
            heads = slice(region.first_head, region.first_head + region.schema.num_kv_heads)
            pool[page, layer, :, :, offset] = value[layer, :, heads]

    def _read(self, page: int, offset: int) -> Bytes:
        return np.concatenate([pool[page, :, :, :, offset] for pool in self.pools], axis=2)

    # ---- the transfer engine

    def finish(
        self, number: int, target: Half | None = None, outcome: Outcome = Outcome.OK, *, corrupt: bool = False
    ) -> None:
        """Carry out an operation (a push goes to `target`) and tell the scheduler."""
        op = self.ops.pop(number)
        value = moved = 0
        if outcome is Outcome.OK:
            for source, sink in self._pieces(op, target):
                value = zlib.crc32(source.tobytes(), value)
                if sink is not None:
                    sink[:] = source
                    moved += sink.size
                    if corrupt:
                        sink[0] ^= 1
        completion = Completion(Ticket(number, "hand"), outcome, bytes=moved, error="broken", value=value)
        self._take(self.scheduler.peers.transferred(number, completion, self.now_ns))
        self.step()

    def _pieces(self, op: TransferOp, target: Half | None) -> Iterator[tuple[Bytes, Bytes | None]]:
        """Source and target bytes of an operation, page by page and span by span; a Verify has no target."""
        if not isinstance(op, Push):
            pool = self.pools[op.rank]
            for page in op.pages:
                for span in op.spans:
                    yield pool[page].reshape(-1)[span.target : span.target + span.size], None
            return
        assert target is not None
        assert op.peer == target.card
        source, sink = self.pools[op.source_rank], target.pools[op.target_rank]
        for mine, theirs in zip(op.source, op.target, strict=True):
            for span in op.spans:
                yield (
                    source[mine].reshape(-1)[span.source : span.source + span.size],
                    sink[theirs].reshape(-1)[span.target : span.target + span.size],
                )


class Pair:
    """Both halves, and the wire between them."""

    def __init__(self, prefill: Half | None = None, decode: Half | None = None) -> None:
        self.prefill = prefill or Half("prefill", "P1")
        self.decode = decode or Half("decode", "D1")

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.prefill, self.decode

    def other(self, half: Half) -> Half:
        return self.decode if half is self.prefill else self.prefill

    def add(self, rid: str, tokens: list[int], room: int, count: int = 4, **fields: Any) -> None:
        """As the router does: the same request to both."""
        for half in self.halves:
            half.add(rid, tokens, room, count, **fields)

    def link(self) -> None:
        """Every pair that decode looks for is found."""
        while self.decode.opened:
            self.decode.hear(Linked(self.decode.opened.pop(0).room, self.prefill.card))

    def unreachable(self) -> None:
        while self.decode.opened:
            self.decode.hear(Unreachable(self.decode.opened.pop(0).room, "Nobody there."))

    def carry(self, half: Half, at: int = 0) -> PairMessage:
        """Deliver message `at` of those that `half` has sent."""
        instance, body = half.out.pop(at)
        to = self.other(half)
        if instance == to.instance:
            to.hear(Heard(half.card, body))
        return body

    def finish(self, half: Half, number: int, outcome: Outcome = Outcome.OK) -> None:
        half.finish(number, self.other(half), outcome)

    def talk(self) -> None:
        """Deliver all messages and carry out all operations until nobody has anything to say; no plan runs."""
        for _ in range(10_000):
            self.link()
            if not any(half.out or half.ops for half in self.halves):
                return
            for half in self.halves:
                while half.out:
                    self.carry(half)
                for number in list(half.ops):
                    self.finish(half, number)
        raise AssertionError("the halves never stop talking")

    def run(self) -> None:
        """Until nothing is left to do."""
        for _ in range(10_000):
            self.talk()
            busy = [half for half in self.halves if half.plans]
            if not busy:
                break
            for half in busy:
                half.run_plan(self.talk)
        else:
            raise AssertionError("the pair never comes to an end")

    def wait(self, ns: int) -> None:
        for half in self.halves:
            half.wait(ns)

    def assert_empty(self) -> None:
        """Nobody holds anything any more."""
        for half in self.halves:
            assert half.scheduler.idle
            pairs = half.scheduler.stats().pairs
            assert (pairs.num_pairing, pairs.num_moving, pairs.num_transfers, pairs.quarantined_pages) == (0, 0, 0, 0)


def with_fallback(**fields: Any) -> Pair:
    return Pair(decode=Half("decode", "D1", fallback=True, **fields))


def wanted(pair: Pair, length: int = 9, count: int = 4, **fields: Any) -> Pair:
    """Request "a" in room 7: the Want has been noted, the prompt is in a plan and nothing of it is computed."""
    pair.add("a", prompt(length), 7, count, **fields)
    pair.link()
    pair.carry(pair.decode)
    pair.carry(pair.prefill)
    assert (pair.prefill.out, pair.decode.out, len(pair.prefill.plans)) == ([], [], 1)
    return pair


def pushing(pair: Pair, **fields: Any) -> Pair:
    """Request "a" in room 7: all is computed, no push has been carried out."""
    wanted(pair, **fields).prefill.run_plan()
    assert pair.prefill.ops
    return pair


def served(pair: Pair, rid: str, length: int, count: int = 4) -> bool:
    return pair.decode.tokens(rid) == answer(prompt(length), count) and pair.decode.end(rid) == ("length", 0)


def kinds(half: Half) -> list[str]:
    return [type(body).__name__ for _, body in half.out]
