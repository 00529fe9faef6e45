"""Pools with a KvTransfer: in the test's process (`Side`), and in another one (`KvPeer`), driven over its pipes."""

from __future__ import annotations

import ctypes
import mmap
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from moonlang.base.clock import NS_PER_S, monotonic_ns
from moonlang.base.registry import find
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard, Push, Span, TransferOp
from moonlang.core.ports import KvTransfer
from moonlang.core.ticket import Completion, Ticket
from moonlang.disaggregation.channel import TransferOptions

SCHEMA = KvSchema(num_layers=4, num_kv_heads=2, head_dim=8, page_size=4, dtype="bfloat16", itemsize=2)
PAGES = 64
DEADLINE_NS = 90 * NS_PER_S
WHOLE = (Span(0, 0, SCHEMA.page_bytes),)
LAYER_BYTES = SCHEMA.page_bytes // SCHEMA.num_layers

Open = Callable[[TransferOptions], KvTransfer]


class Pool:
    """Pages in memory of their own, each byte of which can be looked at."""

    def __init__(self, pages: int = PAGES, schema: KvSchema = SCHEMA) -> None:
        size = pages * schema.page_bytes
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.region = KvRegion(address=self._address, stride=schema.page_bytes, num_pages=pages, schema=schema)

    def page(self, number: int) -> bytes:
        at = number * self.region.stride
        return self.memory[at : at + self.region.stride]

    def fill(self, data: bytes) -> None:
        self.memory[: len(data)] = data


def opener(backend: str) -> Open:
    return find("disaggregation", backend).BACKEND


class Side:
    """An instance with a pool. linked: whether its control connections stand."""

    def __init__(self, open_transfer: Open, instance: str, pages: int = PAGES, *, checksum: bool = True) -> None:
        self.linked = True
        self.pool = Pool(pages)
        options = TransferOptions(host="127.0.0.1", checksum=checksum, linked=lambda _: self.linked)
        self.transfer: KvTransfer = open_transfer(options)
        self.card = self.transfer.register([self.pool.region], instance)

    def wait(self, *tickets: Ticket) -> list[Completion]:
        """The completions of these tickets, and of no others."""
        found: list[Completion] = []
        deadline = monotonic_ns() + DEADLINE_NS
        while len(found) < len(tickets):
            left_s = (deadline - monotonic_ns()) / NS_PER_S
            assert left_s > 0, f"only {len(found)} of {len(tickets)} tickets completed"
            select.select([self.transfer.fileno()], [], [], left_s)
            found += self.transfer.poll()
        assert sorted(done.ticket.id for done in found) == sorted(ticket.id for ticket in tickets)
        return found

    def do(self, op: TransferOp) -> Completion:
        (done,) = self.wait(self.transfer.submit(op))
        return done


def push(
    peer: KvCard,
    source: Sequence[int],
    target: Sequence[int],
    spans: Sequence[Span] = WHOLE,
    deadline_ns: int | None = None,
) -> Push:
    deadline_ns = monotonic_ns() + DEADLINE_NS if deadline_ns is None else deadline_ns
    return Push(
        room=1, peer=peer, source=tuple(source), target=tuple(target), spans=tuple(spans), deadline_ns=deadline_ns
    )


class KvPeer:
    """The other process, as the test sees it."""

    def __init__(
        self, backend: str, instance: str, environ: Mapping[str, str] | None = None, pages: int = PAGES
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, backend, instance, str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )
        self.card = msgspec.json.decode(self._line(), type=KvCard)

    def page(self, number: int) -> bytes:
        assert self.process.stdin
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self._line())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


def main(backend: str, instance: str, pages: str) -> None:
    pool = Pool(int(pages))
    transfer = opener(backend)(TransferOptions(host="127.0.0.1"))
    card = transfer.register([pool.region], instance)
    _say(msgspec.json.encode(card).decode())
    for line in sys.stdin:
        _say(pool.page(int(line)).hex())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
