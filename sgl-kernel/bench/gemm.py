"""Packed products against this machine's limits, measured in the same run: bench/gemm.py [--threads 1 2] [--quick]

Weights of each shape fill far more than the caches (at least 256 MB) and are used in turn, as in a decode step. The
limit of a product is the larger of its memory time (weights at read bandwidth) and its arithmetic time (at the peak of
the dot product, or of float32). Each figure is the best of several rounds; limits and products take turns, since a
shared host's memory rate swings. The figures mean something on an otherwise idle machine only.
"""

import argparse
import time

import sgl_kernel as kernels
import torch
from sgl_kernel import _C

SHAPES = [(3072, 1024), (1024, 3072), (151936, 1024)]  # N, K: out, in
ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 2048]
READ_BYTES = 256 << 20


class Limits:
    """The best rates seen so far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.read = 0.0
        self.arithmetic = 0.0
        self._peak = _C.dot_gflops if dtype == torch.bfloat16 else _C.fma_gflops

    def measure(self) -> None:
        """Take one more sample of each."""
        self.read = max(self.read, _C.read_gbs(READ_BYTES))
        self.arithmetic = max(self.arithmetic, self._peak(30_000))

    def seconds(self, weight_bytes: int, operations: int) -> float:
        """The least time that a product can take."""
        return max(weight_bytes / self.read, operations / self.arithmetic) * 1e-9


def best_seconds(weights: list, x: torch.Tensor, y: torch.Tensor, rounds: int) -> float:
    """Seconds per product, best of `rounds`."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for weight in weights:
            kernels.gemm(weight, x, y)
        best = min(best, (time.perf_counter() - start) / len(weights))
    return best


def run(threads: int, dtype: torch.dtype, rounds: int) -> None:
    """One table: all shapes and numbers of rows on `threads` threads."""
    kernels.set_threads(threads)
    kind = "bf16" if dtype == torch.bfloat16 else "f32"
    limits = Limits(dtype)
    for n, k in SHAPES:
        weight = torch.randn(n, k, dtype=dtype)
        arena = kernels.arena()
        copies = max(1, (256 << 20) // (weight.numel() * weight.itemsize))
        weights = [kernels.pack(weight, kind=kind, arena=arena) for _ in range(copies)]
        for m in ROWS:
            limits.measure()
            x, y = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)
            used = weights if m < 64 else weights[: max(1, copies * 16 // m)]
            seconds = best_seconds(used, x, y, rounds if m * n < 1 << 26 else 2)
            limit = limits.seconds(weights[0].bytes, 2 * m * n * k)
            print(
                f"{threads} threads  {kind:4}  {k:5} -> {n:6}  M {m:4}  {seconds * 1e6:10.1f} us"
                f"  {weights[0].bytes / seconds * 1e-9:6.1f} GB/s  {2 * m * n * k / seconds * 1e-9:6.0f} GFLOP/s"
                f"  {limit / seconds:4.0%} of the limit",
                flush=True,
            )
    print(f"{threads} threads  limits: read {limits.read:.1f} GB/s, {limits.arithmetic:.0f} GFLOP/s\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two rounds per figure instead of seven")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for threads in arguments.threads:
        run(threads, getattr(torch, arguments.dtype), 2 if arguments.quick else 7)


if __name__ == "__main__":
    main()
