"""How many threads torch computes with.

Two OpenMP threads on two cores that also run a server and its client spend their time in barriers: an operation of
0.2 ms was measured at 8 ms. One core always stays free, unless the user says otherwise with OMP_NUM_THREADS.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

_SMALL_BYTES = 8 << 20


def compute_threads(cores: int, offered: int, environment: Mapping[str, str]) -> int:
    """Threads for `cores` usable cores, where torch by itself would take `offered`."""
    if "OMP_NUM_THREADS" in environment:
        return offered
    return max(1, min(offered, cores - 1))


def kernel_threads(cores: int, weight_bytes: int, environment: Mapping[str, str]) -> int:
    """Threads for our own kernels, which share their cores well: all, but one for a model so small that waking the
    others takes longer than they help. A step reads all weights once, some 30 bytes per nanosecond."""
    if "MOONLANG_CPU_THREADS" in environment:
        return max(1, int(environment["MOONLANG_CPU_THREADS"]))
    return cores if weight_bytes > _SMALL_BYTES else 1


def pin_kernel_threads(cores: int, present: int, environment: Mapping[str, str]) -> bool:
    """Whether to bind the threads of our own kernels to cores: when the process may use all `present` cores of the
    machine. Among some of them, others were probably given the rest, and may have been given these too.

    MOONLANG_CPU_PIN=1 or 0 says it by hand.
    """
    said = environment.get("MOONLANG_CPU_PIN")
    return cores == present if said is None else said != "0"


def limit_threads(processes: int = 1) -> int:
    """Set the number of threads of this process, one of `processes` that share the cores, and return it."""
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    threads = compute_threads(cores, torch.get_num_threads(), os.environ)
    torch.set_num_threads(threads)
    return threads
