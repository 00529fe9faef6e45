from typing import Any

from numpy import float32, int32, int64
from numpy.typing import NDArray

Array = Any  # anything with DLPack

class PackedWeight:
    kind: str
    n: int
    k: int
    gated: bool
    segments: int
    bytes: int
    columns: int
    def with_bias(self, bias: Array) -> PackedWeight: ...
    def with_bounds(self, alpha: float, limit: float) -> PackedWeight: ...
    def memory(self) -> NDArray[Any]: ...

class Program:
    isa: str
    measured: bool
    def __init__(self, *, dtype: str, heads: int, kv_heads: int, head_dim: int, value_dim: int = 0) -> None: ...
    def buffer(self, columns: int, kept: bool) -> int: ...
    def embed(self, out: int, table: Array, scale: float) -> None: ...
    def embed_packed(self, out: int, table: PackedWeight, scale: float) -> None: ...
    def given(self, out: int, columns: int) -> None: ...
    def norm(self, x: int, out: int, weight: Array, eps: float, form: str, added: bool) -> None: ...
    def linear(
        self, x: int, out: int, weight: PackedWeight, bias: Array | None, residual: int, act: str, ranks: Any = None
    ) -> None: ...
    def experts(self, x: int, out: int, moe: Any, residual: int) -> None: ...
    def attend(
        self,
        qkv: int,
        out: int,
        *,
        layer: int,
        rotation: Array,
        q_norm: Array | None,
        k_norm: Array | None,
        eps: float,
        norm_form: str,
        scale: float,
        window: int,
        softcap: float,
        sinks: Array | None = None,
    ) -> None: ...
    def by_head(self, x: int, out: int, weights: list[PackedWeight], tail: int) -> None: ...
    def attend_latent(
        self,
        q: int,
        latent: int,
        out: int,
        *,
        layer: int,
        rotation: Array,
        interleaved: bool,
        norm: Array,
        eps: float,
        norm_form: str,
        scale: float,
    ) -> None: ...
    def select(self, x: int, out: int) -> None: ...
    def head(self, hidden: int, weight: PackedWeight, softcap: float) -> None: ...
    def end(self, hidden: int) -> None: ...
    def hand_over(self, to: int) -> None:
        """Write the hidden states that the program ends with to the memory at `to`: [T, columns], dense."""

    def share_head(self, ranks: Any, vocabulary: int) -> None: ...
    def set_pool(self, address: int, pages: int, layers: int, page_tokens: int, dtype: str) -> None: ...
    def report_to(self, address: int, event: int) -> None: ...
    def report_every(self, every: int, base: int) -> None: ...
    def run(
        self,
        ids: NDArray[int64],
        slots: NDArray[int64],
        starts: NDArray[int64],
        lengths: NDArray[int64],
        pages: NDArray[int32],
        kept: NDArray[int64],
        given: int = 0,
    ) -> None:
        """given: address of the hidden states [T, columns] that a program begins with, dense."""

    def logits(self, begin: int, end: int) -> NDArray[float32]: ...
    def best(self, begin: int, end: int) -> tuple[list[int], list[int]]: ...
    def times(self) -> dict[str, int]: ...
