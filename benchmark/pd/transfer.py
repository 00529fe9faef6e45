"""How fast do KV pages move between two processes, against what Mooncake's own blocking call does with the same bytes?

    python benchmark/pd/transfer.py [--rounds 9] [--tokens 2048] [--page-size 16] [--no-checksum] [--out FILE]

The KV of one prompt of a model of the shape of Qwen3-0.6B in bfloat16 (235 MB for 2,048 tokens) goes from the pages of
one process to scattered pages of another, over and over, the ways taking turns:

    wheel      batch_transfer_sync_write of the wheel, an entry for each page: what the others are measured by
    engine     MoonLang's push over the transfer engine, as between hosts, with checksums
    direct     MoonLang's push on one host, with checksums
    layered    as direct, in groups of layers: what leaves while the forward is still running

Ratios are of medians. The time to take the checksum is part of a push.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from moonlang.base import clock
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import KvCard, Push, Span
from moonlang.core.ticket import Outcome
from moonlang.disaggregation.channel import TransferChannel, TransferOptions
from moonlang.mooncake import lib
from moonlang.mooncake.config import MooncakeConfig
from moonlang.mooncake.engine import Engine
from moonlang.mooncake.kv_transfer import MooncakeMover

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import engines  # noqa: E402  (the folder of the benchmarks is no package)

HOST = "127.0.0.1"
GROUPS = 4  # of layers
PATIENCE_NS = 60 * clock.NS_PER_S
TARGETS = {"engine": 0.9, "direct": 2.5}


def schema(page_size: int) -> KvSchema:
    return KvSchema(
        num_layers=28, num_kv_heads=8, head_dim=128, page_size=page_size, dtype="bfloat16", itemsize=2, fingerprint="-"
    )


def pool(pages: int, page_size: int, fill: int) -> tuple[mmap.mmap, KvRegion]:
    """Private memory on huge pages, as the KV pool is."""
    shape = schema(page_size)
    memory = mmap.mmap(-1, pages * shape.page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, fill, len(memory))
    return memory, KvRegion(address=address, stride=shape.page_bytes, num_pages=pages, schema=shape)


def transfer(*, same_host: bool, checksum: bool) -> TransferChannel:
    options = TransferOptions(host=HOST, checksum=checksum)
    config = MooncakeConfig(local_hostname=HOST)
    return TransferChannel(MooncakeMover(options, lambda: Engine(config), same_host=same_host), options)


class Way:
    """One way to move the pages; called once per round."""

    def __init__(self, move: Callable[[], None]) -> None:
        self.move = move
        self.seconds: list[float] = []

    def run(self) -> None:
        begin = clock.monotonic_ns()
        self.move()
        self.seconds.append((clock.monotonic_ns() - begin) / clock.NS_PER_S)


def pushing(
    channel: TransferChannel, card: KvCard, pages: Sequence[tuple[int, int]], groups: int
) -> Callable[[], None]:
    """All pages in `groups` pushes, awaited together."""
    source, target = zip(*pages, strict=True)
    group = card.regions[0].stride // groups

    def move() -> None:
        for at in range(0, group * groups, group):
            deadline = clock.monotonic_ns() + PATIENCE_NS
            spans = (Span(at, at, group),)
            channel.submit(Push(room=1, peer=card, source=source, target=target, spans=spans, deadline_ns=deadline))
        left = groups
        while left:
            select.select([channel.fileno()], [], [])
            for done in channel.poll():
                if done.outcome is not Outcome.OK:
                    raise SystemExit(done.error)
                left -= 1

    return move


def blocking(card: KvCard, region: KvRegion, pages: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """The wheel alone."""
    wheel = lib.transfer_engine()
    if wheel.initialize(HOST, "P2PHANDSHAKE", "tcp", "") or wheel.register_memory(
        region.address, region.num_pages * region.stride
    ):
        raise SystemExit("The wheel cannot be initialised.")
    session = card.sessions[0].partition("@")[0]
    source = [region.address + page * region.stride for page, _ in pages]
    target = [card.regions[0].address + page * region.stride for _, page in pages]
    sizes = [region.stride] * len(pages)

    def move() -> None:
        for at in range(0, len(pages), 1000):  # more in one call fail
            part = slice(at, at + 1000)
            if wheel.batch_transfer_sync_write(session, source[part], target[part], sizes[part]):
                raise SystemExit("The wheel failed.")

    return move


def serve(pages: int, page_size: int) -> None:
    """The decode side: a pool that others write into, until the standard input ends."""
    memory, region = pool(pages, page_size, 0)
    channel = transfer(same_host=True, checksum=True)
    sys.stdout.write(msgspec.json.encode(channel.register([region], "decode")).decode() + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del memory


def measure(args: argparse.Namespace) -> dict[str, Way]:
    pages = args.tokens // args.page_size
    command = [sys.executable, __file__, "--serve", "--page-size", str(args.page_size), "--tokens", str(args.tokens)]
    memory, region = pool(2 * pages, args.page_size, 7)
    pairs = [(page, 2 * (pages - 1 - page) + 1) for page in range(pages)]  # no two neighbours stay neighbours
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as decode:
        assert decode.stdout
        card = msgspec.json.decode(decode.stdout.readline(), type=KvCard)
        engine = transfer(same_host=False, checksum=args.checksum)
        direct = transfer(same_host=True, checksum=args.checksum)
        for channel in (engine, direct):
            channel.register([region], "prefill")
        ways = {
            "wheel": Way(blocking(card, region, pairs)),
            "engine": Way(pushing(engine, card, pairs, 1)),
            "direct": Way(pushing(direct, card, pairs, 1)),
            "layered": Way(pushing(direct, card, pairs, GROUPS)),
        }
        for way in ways.values():
            way.move()  # connections and page tables
        for _ in range(args.rounds):
            for way in ways.values():
                way.run()
        engine.close()
        direct.close()
    del memory
    return ways


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--no-checksum", dest="checksum", action="store_false")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "pd_transfer.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(2 * args.tokens // args.page_size, args.page_size)
        return 0
    ways = measure(args)
    size = args.tokens * schema(args.page_size).token_bytes
    base = statistics.median(ways["wheel"].seconds)
    print(
        f"{size / 1e6:.0f} MB in pages of {args.page_size} tokens; {args.rounds} rounds; load {os.getloadavg()[0]:.1f}"
    )
    rows: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        median, best = statistics.median(way.seconds), min(way.seconds)
        rows[name] = {"median_ms": median * 1e3, "best_ms": best * 1e3, "gb_per_s": size / median / 1e9}
        rows[name]["ratio"] = base / median
        print(f"{name:8}{median * 1e3:8.1f} ms median{best * 1e3:8.1f} best{size / median / 1e9:7.2f} GB/s", end="")
        print(f"{base / median:7.2f} x wheel" + (f" (wanted {TARGETS[name]})" if name in TARGETS else ""))
    result = {"machine": engines.machine(), "wheel": lib.version(), "bytes": size, "page_size": args.page_size}
    args.out.write_text(json.dumps(result | {"checksum": args.checksum, "ways": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
