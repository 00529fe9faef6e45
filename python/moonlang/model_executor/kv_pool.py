"""The device pool: pages of keys and values in the one page format (see `core.kv`)."""

from __future__ import annotations

import contextlib
import math
import mmap
import os

import torch
from torch import Tensor

from moonlang.core.kv import KvRegion, KvSchema


class KvPool:
    """buffer: [P, L, 2, K, p, D], zeroed: memory that nobody wrote holds no NaN that a mask could not hide.

    Of a latent: [P, L, 1, 1, p, D], which is key and value.

    With scales behind the rows D is larger by the bytes of a scale.
    """

    def __init__(
        self, schema: KvSchema, num_pages: int, device: torch.device | str = "cpu", memory: int | None = None
    ) -> None:
        """memory: descriptor of what to use on CPU, where another process maps the pool too: see `open_pool`."""
        self.schema = schema
        self.num_pages = num_pages
        row = schema.row_bytes // schema.itemsize
        shape = (num_pages, schema.num_layers, schema.halves, schema.num_kv_heads, schema.page_size, row)
        self.buffer: Tensor = _zeros(shape, getattr(torch, schema.dtype), torch.device(device), memory)

    def key(self, layer: int) -> Tensor:
        """Keys of one layer: a view [P, K, p, D]."""
        return self.buffer[:, layer, 0, ..., : self.schema.head_dim]

    def value(self, layer: int) -> Tensor:
        """Values of one layer: a view [P, K, p, D]."""
        return self.buffer[:, layer, -1, ..., : self.schema.head_dim]

    @property
    def inline_scales(self) -> bool:
        """Whether each row of D numbers is followed by its scale."""
        return self.schema.scale_bytes > 0

    def region(self, first_head: int = 0, first_layer: int = 0) -> KvRegion:
        """Address, stride (bytes) and schema, for engines that read or write pages. The rest: see KvRegion."""
        return KvRegion(
            address=self.buffer.data_ptr(),
            stride=self.schema.page_bytes,
            num_pages=self.num_pages,
            schema=self.schema,
            first_head=first_head,
            first_layer=first_layer,
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, shared: int | None) -> Tensor:
    """Zeroed memory. On CPU it is mapped: page-aligned, and it takes no memory and no time before it is used.

    Private if it can be, since shared memory gets no huge pages: with 4 KB pages attention waits for the address
    translation.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if shared is not None:
        if os.fstat(shared).st_size < size:
            os.ftruncate(shared, size)
        memory = mmap.mmap(shared, size)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
