"""Attention in the shape of Qwen3-0.6B: decode GB/s of keys and values, prefill GFLOP/s, each against its limit.

    python bench/attention.py [--read 65] [--peak 472] [--seconds 0.5]

The limits are those of the machine: GB/s that all cores read together, GFLOP/s of bf16 products (bench/gemm.py measures
them). Prints the best and the median of the runs.
"""

from __future__ import annotations

import argparse
import math
import mmap
import statistics
import time

import sgl_kernel
import torch
from sgl_kernel.attention import AttendPlan, KvPages, attend

_HEADS, _KV_HEADS, _DIM, _PAGE, _LAYERS = 16, 8, 128, 16, 28


def _huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory on huge pages, as the engine's pool has it."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Work:
    """Rows with one history length each, all layers of the pool in turn, so that nothing stays in a cache."""

    def __init__(self, rows: int, start: int, length: int, dtype: torch.dtype, shared: bool = False) -> None:
        pages = -(-(start + length) // _PAGE)
        shape = (pages * (1 if shared else rows), _LAYERS, 2, _KV_HEADS, _PAGE, _DIM)
        numbers = torch.randn(shape[3:])
        self.buffer = _huge(shape, dtype).copy_(numbers)
        self.layers = [KvPages(self.buffer, layer) for layer in range(_LAYERS)]
        order = torch.arange(pages).repeat(rows, 1) if shared else torch.randperm(shape[0]).view(rows, pages)
        self.plan = AttendPlan()
        q_type = dtype if dtype.itemsize > 1 else torch.bfloat16
        self.q = torch.randn(rows * length, _HEADS * _DIM).to(q_type)
        self.out = torch.empty_like(self.q)
        self.plan.build(
            order.int().contiguous(),
            torch.full((rows,), start, dtype=torch.int32),
            torch.full((rows,), length, dtype=torch.int32),
            q_heads=_HEADS,
            kv_heads=_KV_HEADS,
            page_tokens=_PAGE,
            value_dim=_DIM,
        )
        self.bytes = rows * (start + length) * _KV_HEADS * _DIM * 2 * dtype.itemsize
        self.flops = 4 * rows * _HEADS * _DIM * sum(start + i + 1 for i in range(length))

    def times(self, seconds: float) -> list[float]:
        """Seconds per layer of repeated passes."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < 3 or time.perf_counter() < end:
            begin = time.perf_counter()
            for kv in self.layers:
                attend(self.plan, self.q, kv, self.out, scale=_DIM**-0.5)
            found.append((time.perf_counter() - begin) / _LAYERS)
        return found


def _report(name: str, amount: float, limit: float, unit: str, times: list[float]) -> None:
    best, middle = amount / min(times), amount / statistics.median(times)
    print(
        f"{name:34s} {statistics.median(times) * 1e6:9.1f} us/layer"
        f"  {middle:7.1f} {unit} ({100 * middle / limit:3.0f} %)"
        f"  best {best:7.1f} ({100 * best / limit:3.0f} %)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=float, default=65.0, help="GB/s that all cores read together")
    parser.add_argument("--peak", type=float, default=472.0, help="GFLOP/s of bf16 products")
    parser.add_argument("--seconds", type=float, default=0.5, help="per line")
    args = parser.parse_args()
    print(f"{sgl_kernel.isa()}, {sgl_kernel.threads()} threads")
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for rows in (1, 8, 32):
            for context in (512, 2048):
                if rows * context > 1 << 15:
                    continue
                work = Work(rows, context - 1, 1, dtype)
                name = f"decode {str(dtype)[6:]} {rows} x {context}"
                _report(name, work.bytes / 1e9, args.read, "GB/s", work.times(args.seconds))
    work = Work(16, 1055, 1, torch.bfloat16, shared=True)
    _report("decode shared 16 x 1056, as read", work.bytes / 1e9, args.read, "GB/s", work.times(args.seconds))
    for start, length in ((0, 512), (0, 2048), (1536, 512), (1024, 32)):
        work = Work(1, start, length, torch.bfloat16)
        _report(f"prefill {length} after {start}", work.flops / 1e9, args.peak, "GFLOP/s", work.times(args.seconds))


if __name__ == "__main__":
    main()
