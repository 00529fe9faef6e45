"""Packed products against this machine's limits, measured in the same run: bench/gemm.py [--threads 1 2] [--rounds 7]

Weights of each shape fill far more than the caches (at least 256 MB) and are used in turn, as in a decode step. The
limit of a product is the larger of its memory time (weights at read bandwidth) and its arithmetic time (at the peak of
the dot product, or of float32). Limits and products take turns within every round, since a shared host's rates swing,
and the best of all rounds is taken of each. The figures mean something on an otherwise idle machine only.
"""

import argparse
import time

import sgl_kernel as kernels
import torch
from sgl_kernel import _C

SHAPES = [(3072, 1024), (1024, 3072), (1024, 2048), (151936, 1024)]  # N, K: out, in
ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 2048]
READ_BYTES = 64 << 20
PEAK_ROUNDS = 20_000  # of register arithmetic: a millisecond
ENOUGH_SECONDS = 0.05  # of a product per round


class Best:
    """The best rates and times seen so far, of one product and of the machine."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.read = 0.0
        self.arithmetic = 0.0
        self.seconds = float("inf")
        self._peak = _C.dot_gflops if dtype == torch.bfloat16 else _C.fma_gflops

    def take(self, weights: list, x: torch.Tensor, y: torch.Tensor) -> None:
        """One more round of everything."""
        self.read = max(self.read, _C.read_gbs(READ_BYTES))
        self.arithmetic = max(self.arithmetic, self._peak(PEAK_ROUNDS))
        begin = now = time.perf_counter()
        done = 0
        while done == 0 or now - begin < ENOUGH_SECONDS:
            start = now
            for weight in weights:
                kernels.gemm(weight, x, y)
            now = time.perf_counter()
            self.seconds = min(self.seconds, (now - start) / len(weights))
            done += 1

    def limit_seconds(self, weight_bytes: int, operations: int) -> float:
        """The least time that the product can take."""
        return max(weight_bytes / self.read, operations / self.arithmetic) * 1e-9


def run(threads: int, dtype: torch.dtype, rows: list[int], rounds: int) -> None:
    """One table: all shapes and numbers of rows on `threads` threads."""
    kernels.set_threads(threads)
    kind = "bf16" if dtype == torch.bfloat16 else "f32"
    for n, k in SHAPES:
        weight = torch.randn(n, k, dtype=dtype)
        arena = kernels.arena()
        copies = max(1, (256 << 20) // (weight.numel() * weight.itemsize))
        weights = [kernels.pack(weight, kind=kind, arena=arena) for _ in range(copies)]
        for m in rows:
            x, y = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)
            used = weights if m < 64 else weights[: max(1, copies * 16 // m)]
            best = Best(dtype)
            for _ in range(rounds):
                best.take(used, x, y)
            size, operations = weights[0].bytes, 2 * m * n * k
            print(
                f"{threads} threads  {kind:4}  {k:5} -> {n:6}  M {m:4}  {best.seconds * 1e6:10.1f} us"
                f"  {size / best.seconds * 1e-9:6.1f} of {best.read:5.1f} GB/s"
                f"  {operations / best.seconds * 1e-9:5.0f} of {best.arithmetic:4.0f} GFLOP/s"
                f"  {best.limit_seconds(size, operations) / best.seconds:4.0%} of the limit",
                flush=True,
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for threads in arguments.threads:
        run(threads, getattr(torch, arguments.dtype), arguments.rows, arguments.rounds)


if __name__ == "__main__":
    main()
