"""Attention in the shape of Qwen3-0.6B: decode GB/s of keys and values, prefill GFLOP/s, each against its limit.

    python bench/attention.py [--threads 2] [--seconds 0.5]

The limits are measured between the runs of a line: GB/s that all threads read together, GFLOP/s of their bf16 products.
Prints the best and the median of the runs against the best of the limit. Narrow types count the bytes they store.
"""

from __future__ import annotations

import argparse
import math
import mmap
import statistics
import time

import sgl_kernel
import torch
from sgl_kernel import _C
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
        inline = dtype == torch.int8  # numbers that have a scale behind each row: 1.0
        shape = (pages * (1 if shared else rows), _LAYERS, 2, _KV_HEADS, _PAGE, _DIM + 4 * inline)
        self.buffer = _huge(shape, dtype)
        if inline:
            self.buffer[..., _DIM:] = torch.ones(1).view(torch.int8)
        self.buffer[..., :_DIM] = torch.randn(*shape[3:5], _DIM) * (30 if inline else 1)
        self.layers = [KvPages(self.buffer, layer, inline_scales=inline) for layer in range(_LAYERS)]
        order = torch.arange(pages).repeat(rows, 1) if shared else torch.randperm(shape[0]).view(rows, pages)
        self.length = length
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
        self.bytes = rows * (start + length) * _KV_HEADS * shape[-1] * 2 * dtype.itemsize
        self.flops = 4 * rows * _HEADS * _DIM * sum(start + i + 1 for i in range(length))

    def once(self) -> float:
        """Seconds per layer of one pass."""
        begin = time.perf_counter()
        for kv in self.layers:
            attend(self.plan, self.q, kv, self.out, scale=_DIM**-0.5)
        return (time.perf_counter() - begin) / _LAYERS


def _line(name: str, work: Work, seconds: float) -> None:
    """Decode lines are held against reading, prefill lines (more than a query per row) against products."""
    reads = work.length == 1
    amount, unit = (work.bytes / 1e9, "GB/s") if reads else (work.flops / 1e9, "GFLOP/s")
    times, limits = [], []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(work.once())
        limits.append(_C.read_gbs(1 << 28) if reads else _C.dot_gflops(300))
    best, middle, limit = amount / min(times), amount / statistics.median(times), max(limits)
    print(
        f"{name:34s} {statistics.median(times) * 1e6:9.1f} us/layer"
        f"  {middle:7.1f} of {limit:5.1f} {unit} ({100 * middle / limit:3.0f} %)"
        f"  best {best:7.1f} ({100 * best / limit:3.0f} %)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: the CPUs there are")
    parser.add_argument("--seconds", type=float, default=0.5, help="per line")
    args = parser.parse_args()
    if args.threads:
        sgl_kernel.set_threads(args.threads)
    print(f"{sgl_kernel.isa()}, {sgl_kernel.threads()} threads")
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        for rows, context in ((1, 512), (1, 2048), (8, 300), (32, 300)):
            _line(f"decode {str(dtype)[6:]} {rows} x {context}", Work(rows, context - 1, 1, dtype), args.seconds)
    _line("decode shared 16 x 1056, as read", Work(16, 1055, 1, torch.bfloat16, shared=True), args.seconds)
    for start, length in ((0, 512), (0, 2048), (1536, 512), (1024, 32)):
        _line(f"prefill {length} after {start}", Work(1, start, length, torch.bfloat16), args.seconds)


if __name__ == "__main__":
    main()
