"""What one forward looks like to the attention layers, and the context that carries it through the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """Rows of one forward; row i covers positions [starts[i], starts[i] + lengths[i]) of its sequence.

    Tokens lie in row order in the [T] tensors. Everything before a row's start is in the cache already.
    """

    num_decode: int  # rows [0, num_decode) have length 1, prefill rows follow
    starts: Tensor  # [B] int64
    lengths: Tensor  # [B] int64
    positions: Tensor  # [T] int64
    page_table: Tensor  # [B, Pmax] int64 page ids; entries beyond a row's need are 0 and never read
    store_page: Tensor  # [T] int64, the page where the KV of each new token goes,
    store_offset: Tensor  # [T] int64, and its place in that page
    row_starts: list[int]  # starts and lengths as Python ints
    row_lengths: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How one layer attends. window: a token sees itself and the `window` - 1 tokens before it; None: all before it.

    softcap c bounds the scores before the mask: c * tanh(s / c). value_dim: the first so many numbers of a key are its
    value, and there are no others (a latent); None: values are stored beside the keys.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    value_dim: int | None = None


class KvPages(Protocol):
    """The pool as attention sees it. buffer: [P, L, 2, K, p, D], or [P, L, 1, 1, p, D]; see `kv_pool.KvPool`."""

    buffer: Tensor

    @property
    def inline_scales(self) -> bool: ...

    def key(self, layer: int) -> Tensor: ...  # [P, K, p, D], a view

    def value(self, layer: int) -> Tensor: ...  # [P, K, p, D], a view


class AttentionBackend(Protocol):
    """Attention over a paged pool."""

    def prepare(self, layout: BatchLayout, pool: KvPages) -> Any:
        """Everything that all layers of one forward share: indices, masks, groups of rows."""
        ...

    def attend(
        self,
        prepared: Any,
        pool: KvPages,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store k and v ([T, K, D]) in the pool, then attend from q ([T, H, D]). Returns [T, H, D].

        v is None when spec.value_dim is set; then [T, H, value_dim] comes out. sinks: [H], see `layers.sinks`.
        """
        ...


class ForwardContext:
    """Goes with the hidden states through one forward: where the rows are, and how to attend.

    stored: called with the number of layers whose keys and values are in the pool; None: nobody wants to know.
    """

    __slots__ = ("_backend", "_pool", "_prepared", "_stored", "layout")

    def __init__(
        self,
        layout: BatchLayout,
        pool: KvPages,
        backend: AttentionBackend,
        stored: Callable[[int], None] | None = None,
    ) -> None:
        self.layout = layout
        self._stored = stored
        self._pool = pool
        self._backend = backend
        self._prepared = backend.prepare(layout, pool)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q: [T, H, D], k, v: [T, K, D] of the new tokens -> [T, H, D]. Their k and v are in the pool afterwards.

        v is None where keys are values: see AttentionSpec.value_dim. sinks: [H], see `layers.sinks`.
        """
        out = self._backend.attend(self._prepared, self._pool, layer, q, k, v, spec, sinks)
        if self._stored is not None:
            self._stored(layer + 1)
        return out
