"""How fast do pages go to the Mooncake store and back, against the wheel's own batch calls with the same bytes?

    python benchmark/hicache/store.py [--page-kb 1792] [--pages 64] [--rounds 7]

Both use a client in this process and take turns; every round puts new keys. Pages go to memory of a process of its own,
through TCP (`service`), and to memory of the client itself (`own`). Ours makes and checks a manifest with a sum for
every page, the wheel's call moves bytes only. `checksum` is the rate of the checksums alone.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engines
import numpy as np
import services

from moonlang.base import checksum
from moonlang.base.clock import monotonic_ns
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.page_key import PageKeys
from moonlang.core.storage import Load, Save, StoreOp
from moonlang.mooncake import lib
from moonlang.storage.channel import StoreOptions
from moonlang.storage.mooncake import BACKEND

HERE = Path(__file__).parent
MINUTE_NS = 60_000_000_000
GOAL = 0.85
PLACES = ("service", "own")
WARM_UP = 3  # rounds: they touch the store's memory


class Ours:
    """The channel that the engine uses."""

    def __init__(self, pool: np.ndarray, schema: KvSchema, extra: dict[str, object]) -> None:
        self.channel = BACKEND(StoreOptions(model="bench", extra=extra))
        self.channel.register(
            [KvRegion(address=pool.ctypes.data, stride=schema.page_bytes, num_pages=len(pool), schema=schema)]
        )

    def put(self, name: str, pages: range) -> None:
        self._do(Save(keys=tuple(self._keys(name, len(pages))), pages=tuple(pages)), len(pages))

    def get(self, name: str, pages: range) -> None:
        keys = tuple(self._keys(name, len(pages)))
        self._do(Load(keys=keys, pages=tuple(pages), deadline_ns=monotonic_ns() + MINUTE_NS), len(pages))

    def _keys(self, name: str, count: int) -> list[bytes]:
        return PageKeys(1, name).upto(list(range(count)), count)

    def _do(self, op: StoreOp, count: int) -> None:
        self.channel.submit(op)
        select.select([self.channel.fileno()], [], [], 60)
        (done,) = self.channel.poll()
        if done.count != count:
            raise RuntimeError(f"{done.count} of {count} pages: {done.error}")


class Wheel:
    """The wheel's batch calls."""

    def __init__(self, pool: np.ndarray, master: str, segment: int) -> None:
        self._pool = pool
        self._store = lib.store()
        if self._store.setup("127.0.0.1", "P2PHANDSHAKE", segment, 16 << 20, "tcp", "", master):
            raise RuntimeError("the store could not be set up")
        self._store.register_buffer(pool.ctypes.data, pool.nbytes)
        self._placement = lib.placement(self._store.get_hostname() if segment else "")

    def put(self, name: str, pages: range) -> None:
        self._check(self._store.batch_put_from(*self._call(name, pages), self._placement), 0)

    def get(self, name: str, pages: range) -> None:
        self._check(self._store.batch_get_into(*self._call(name, pages)), self._pool.shape[1])

    def forget(self) -> None:
        """Remove everything that is in the store, whoever has put it there."""
        self._store.remove_all(True)

    def _call(self, name: str, pages: range) -> tuple[list[str], list[int], list[int]]:
        size = self._pool.shape[1]
        addresses = [self._pool.ctypes.data + page * size for page in pages]
        return [f"wheel-{name}-{i}" for i in range(len(pages))], addresses, [size] * len(pages)

    def _check(self, answers: list[int], wanted: int) -> None:
        if any(answer != wanted for answer in answers):
            raise RuntimeError(f"the wheel answered {answers}")


class Sums:
    """The checksums of pages, and nothing else."""

    def __init__(self, pool: np.ndarray) -> None:
        self._pool = pool

    def put(self, name: str, pages: range) -> None:
        size = self._pool.shape[1]
        for page in pages:
            checksum.of_memory([(self._pool.ctypes.data + page * size, size)])

    get = put


def mapped(size: int) -> np.ndarray:
    """Memory as that of an engine's pool: private, in huge pages where the kernel has them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def timed(call: Callable[[], None], size: int) -> float:
    """GB per second."""
    begin = time.perf_counter()
    call()
    return size / (time.perf_counter() - begin) / 1e9


def measure(place: str, pool: np.ndarray, schema: KvSchema, args: argparse.Namespace) -> dict[str, list[float]]:
    """GB per second by client and way, one figure per round. place: see PLACES."""
    size = args.pages * schema.page_bytes
    segment = 4 * size if place == "own" else 0
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, services.store(Path(name)) as store:
        extra = {"master_server_address": store.address, "protocol": "tcp", "global_segment_size": segment}
        ours, wheel, sums = Ours(pool, schema, extra), Wheel(pool, store.address, segment), Sums(pool)
        out, back = range(args.pages), range(args.pages, 2 * args.pages)
        for turn in range(args.rounds + WARM_UP):
            for name, client in (("ours", ours), ("wheel", wheel), ("checksum", sums)):
                key = f"{os.getpid()}-{turn}"
                put = timed(lambda c=client, k=key: c.put(k, out), size)
                get = timed(lambda c=client, k=key: c.get(k, back), size)
                if turn >= WARM_UP:
                    found.setdefault(f"{name} put", []).append(put)
                    found.setdefault(f"{name} get", []).append(get)
            wheel.forget()  # so that the next round gets memory that has been touched
        ours.channel.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-kb", type=int, default=1792, help="16 tokens of a Qwen3-0.6B shape in bf16")
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "hicache_store.json")
    args = parser.parse_args()
    # A layer of one head and one token is 2 x 2 x head_dim bytes.
    schema = KvSchema(
        num_layers=1, num_kv_heads=1, head_dim=args.page_kb * 256, page_size=1, dtype="bfloat16", itemsize=2
    )
    # Mapped, as an engine's pool is: it begins with a page of the system, and its pages at multiples of 64.
    pool = mapped(2 * args.pages * schema.page_bytes).reshape(2 * args.pages, -1)
    pool[:] = np.random.default_rng(1).integers(0, 256, pool.shape, np.uint8)
    results = {place: measure(place, pool, schema, args) for place in PLACES}
    for place, found in results.items():
        medians = {name: statistics.median(values) for name, values in found.items()}
        for way in ("put", "get"):
            ratio = medians[f"ours {way}"] / medians[f"wheel {way}"]
            print(
                f"{place:8} {way}: ours {medians[f'ours {way}']:.2f} GB/s, wheel {medians[f'wheel {way}']:.2f} GB/s, "
                f"{ratio:.0%} ({'reached' if ratio >= GOAL else 'MISSED'} {GOAL:.0%}); "
                f"checksum {medians[f'checksum {way}']:.1f} GB/s"
            )
    report = {"machine": engines.machine(), "page_bytes": schema.page_bytes, "pages": args.pages, "gb_per_s": results}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
