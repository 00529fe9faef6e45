"""How many pages the KV pool gets, and why."""

from __future__ import annotations

import torch

from moonlang.base import host_memory
from moonlang.base.errors import ConfigError
from moonlang.core.kv import KvSchema

_GIB = 1 << 30
_CPU_SHARE = 0.5  # of the memory that is free before the weights are loaded: the machine runs other things too
_GPU_SHARE = 0.88


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on `device`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory.free_bytes()


def pool_pages(
    schema: KvSchema,
    *,
    free: int,
    weights: int,
    device: torch.device,
    mem_fraction: float | None,
    max_total_tokens: int | None,
    max_running: int,
    context_length: int,
) -> tuple[int, str]:
    """(number of pages, reason). free: bytes free before the weights were loaded; weights: bytes they take.

    The pool never exceeds what `max_running` sequences of full context can use, nor --max-total-tokens. ConfigError
    when not even one page fits.
    """
    share = mem_fraction if mem_fraction is not None else _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
    budget = int(free * share) - weights
    pages = budget // schema.page_bytes
    reason = f"{share:g} of {free / _GIB:.1f} GiB free memory less {weights / _GIB:.2f} GiB of weights"
    useful = max_running * -(-context_length // schema.page_size)
    if useful < pages:
        pages, reason = useful, f"{max_running} sequences of {context_length} tokens need no more"
    if max_total_tokens is not None and max_total_tokens // schema.page_size < pages:
        pages, reason = max_total_tokens // schema.page_size, "--max-total-tokens"
    if pages < 1:
        raise ConfigError(
            f"No memory is left for the KV cache: {reason}, and a page takes {schema.page_bytes} bytes.",
            hint="Raise --mem-fraction-static or --max-total-tokens, or free some memory.",
        )
    return pages, reason
