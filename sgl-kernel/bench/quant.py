"""Quantised weights: GB/s of weights and time against bf16, interleaved, since the machine's memory rate swings.

    python bench/quant.py [--rows 1 4 32 256] [--shape 98304 1024] [--seconds 0.5]

Bits per weight count scales and zero points. The ratio is the median of bf16's time over that of the kind. The weights
do not fit in the caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import sgl_kernel
import torch

GROUP = 128


def weights(n: int, k: int) -> dict[str, object]:
    """The same random matrix in every form."""
    arena = sgl_kernel.arena()
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    per_row, per_group = torch.full((n, 1), 1e-3), torch.full((n, -(-k // GROUP)), 1e-3)
    fp8 = (codes.float() / 127).to(torch.float8_e4m3fn)

    def quantized(
        codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, kind: str, group: int
    ) -> object:
        return sgl_kernel.pack_quantized([codes], [scales], [zeros], kind=kind, group=group, arena=arena)

    return {
        "bf16": sgl_kernel.pack(codes.bfloat16(), kind="bf16", arena=arena),
        "int8 per row": quantized(codes, per_row, None, "int8", k),
        f"int8 group {GROUP}": quantized(codes, per_group, None, "int8", GROUP),
        f"int4 group {GROUP}": quantized(codes >> 4, per_group, None, "int4", GROUP),
        f"int4 group {GROUP}, zeros": quantized(codes >> 4, per_group, per_group, "int4", GROUP),
        "w8a8": quantized(codes, per_row, None, "w8a8", k),
        f"e4m3 group {GROUP}": quantized(fp8, per_group, None, "fp8_e4m3", GROUP),
    }


def interleaved(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32, 256])
    parser.add_argument("--shape", type=int, nargs=2, default=[98304, 1024], metavar=("N", "K"))
    parser.add_argument("--seconds", type=float, default=0.5, help="per line")
    args = parser.parse_args()
    n, k = args.shape
    packed = weights(n, k)
    print(f"{sgl_kernel.isa()}, {sgl_kernel.threads()} threads, {n} x {k}")
    for m in args.rows:
        x, y = torch.randn(m, k).bfloat16(), torch.empty(m, n, dtype=torch.bfloat16)
        calls = {name: partial(sgl_kernel.gemm, w, x, y) for name, w in packed.items()}
        times = interleaved(calls, args.seconds)
        for name, found in times.items():
            size, middle = packed[name].bytes, statistics.median(found)
            ratio = statistics.median(b / t for b, t in zip(times["bf16"], found, strict=True))
            print(
                f"{m:4d} rows  {name:22s} {8 * size / n / k:5.2f} bits  {middle * 1e3:8.3f} ms"
                f"  {size / middle / 1e9:5.1f} GB/s (best {size / min(found) / 1e9:5.1f})"
                f"  {2 * m * n * k / middle / 1e9:6.0f} GFLOP/s  {ratio:5.2f} x bf16",
                flush=True,
            )


if __name__ == "__main__":
    main()
