"""Row operations, sampling and experts: time per call, and achieved / limit where a limit is known.

    python bench/rowops.py [--read 65] [--peak 472] [--seconds 0.3]

The limits are those of the machine: GB/s that all cores read together, GFLOP/s of bf16 products (bench/gemm.py measures
them). Row operations work in the caches and may pass the limit of memory. Prints the median and the best of the runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import sgl_kernel
import torch
from sgl_kernel import moe, rowops, sampling


class Bench:
    """The machine's limits, and how long a line takes."""

    def __init__(self, read: float, peak: float, seconds: float) -> None:
        self.read, self.peak, self.seconds = read, peak, seconds

    def line(self, name: str, call: Callable[[], None], *, megabytes: float = 0.0, gflop: float = 0.0) -> None:
        """Time `call`, which moves so many MB and computes so many GFLOP; the limit is the larger of the two times."""
        call()
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        limit = max(megabytes / 1e3 / self.read, gflop / self.peak)
        middle = statistics.median(times)
        print(
            f"{name:44s} {middle * 1e6:9.1f} us  {100 * limit / middle:4.0f} % of the limit"
            f"  best {min(times) * 1e6:9.1f} us ({100 * limit / min(times):3.0f} %)",
            flush=True,
        )


def norms(bench: Bench) -> None:
    weight = torch.ones(1024).bfloat16()
    for rows in (1, 32, 2048):
        x, y, residual = (torch.randn(rows, 1024).bfloat16() for _ in range(3))
        wide, inner = torch.randn(rows, 6144).bfloat16(), torch.empty(rows, 3072).bfloat16()
        norm = partial(rowops.rms_norm, x, weight, 1e-6, y=y)
        bench.line(f"rms_norm {rows} x 1024", norm, megabytes=rows * 4096 / 1e6)
        bench.line(f"residual + rms_norm {rows} x 1024", partial(norm, residual=residual), megabytes=rows * 8192 / 1e6)
        bench.line(f"silu_mul {rows} x 3072", partial(rowops.gated, wide, inner, "silu"), megabytes=rows * 18432 / 1e6)


def samplers(bench: Bench, vocab: int = 151_936) -> None:
    kinds = {
        "greedy": (0.0, 0, 1.0, 0.0),
        "temperature": (1.0, 0, 1.0, 0.0),
        "top_k 50": (1.0, 50, 1.0, 0.0),
        "top_p 0.9": (0.7, 0, 0.9, 0.0),
        "top_k 50, top_p 0.9, min_p 0.05": (0.7, 50, 0.9, 0.05),
    }
    for rows in (1, 32):
        logits, megabytes = torch.randn(rows, vocab) * 4, rows * vocab * 4 / 1e6
        tokens, peaks, seeds = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), torch.arange(rows)
        sample = partial(sampling.sample, logits, seeds=seeds, positions=seeds, tokens=tokens, peaks=peaks)
        for name, (temperature, top_k, top_p, min_p) in kinds.items():
            call = partial(
                sample,
                temperature=torch.full((rows,), temperature),
                top_k=torch.full((rows,), top_k),
                top_p=torch.full((rows,), top_p, dtype=torch.float64),
                min_p=torch.full((rows,), min_p),
            )
            bench.line(f"sample {rows} x {vocab}, {name}", call, megabytes=megabytes)
        report = partial(
            sampling.log_probabilities,
            logits,
            temperature=torch.ones(rows),
            ids=torch.zeros(rows, 1, dtype=torch.int64),
            id_values=torch.zeros(rows, 1),
            top_ids=torch.zeros(rows, 5, dtype=torch.int32),
            top_values=torch.zeros(rows, 5),
        )
        bench.line(f"log_probabilities {rows} x {vocab}, top 5", report, megabytes=megabytes)


def mixtures(bench: Bench, experts: int = 64, per_token: int = 8, size: int = 1024, inner: int = 512) -> None:
    arena = sgl_kernel.arena()

    def pack(n: int, k: int, gated: bool = False) -> object:
        return sgl_kernel.pack((torch.randn(n, k) * 0.02).bfloat16(), kind="bf16", gated=gated, arena=arena)

    layer = moe.moe(
        router=pack(experts, size),
        gate_up=[pack(2 * inner, size, True) for _ in range(experts)],
        down=[pack(size, inner) for _ in range(experts)],
        gating=moe.gating(per_token, normalise=True),
    )
    for rows in (1, 8, 32, 512, 2048):
        x, y = torch.randn(rows, size).bfloat16(), torch.empty(rows, size).bfloat16()
        visited = experts * (1 - (1 - per_token / experts) ** rows)
        bench.line(
            f"moe {rows} tokens, {per_token} of {experts} x [{inner}, {size}]",
            partial(moe.run_moe, layer, x, y),
            megabytes=visited * 3 * size * inner * 2 / 1e6,
            gflop=rows * per_token * 6 * size * inner / 1e9,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=float, default=65.0, help="GB/s that all cores read together")
    parser.add_argument("--peak", type=float, default=472.0, help="GFLOP/s of bf16 products")
    parser.add_argument("--seconds", type=float, default=0.3, help="per line")
    args = parser.parse_args()
    print(f"{sgl_kernel.isa()}, {sgl_kernel.threads()} threads")
    bench = Bench(args.read, args.peak, args.seconds)
    norms(bench)
    samplers(bench)
    mixtures(bench)


if __name__ == "__main__":
    main()
