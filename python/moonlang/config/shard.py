"""Which part of a model one tensor-parallel rank holds. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

_UNIT, _QUANTIZED_UNIT = 2, 4  # products that the kernels take at a time
SEGMENTS = 8  # of K, in the tree in which row-parallel sums are added: the most ranks that can share it


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size` that compute one model together."""

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> range:
        """This rank's share of `total` columns, heads or tokens; shares differ by one at most."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def kv_part(self, heads: int) -> range:
        """This rank's share of the KV heads; where there are fewer than ranks, several ranks hold a copy of one."""
        if heads >= self.size:
            return self.part(heads)
        head = self.rank * heads // self.size
        return range(head, head + 1)


WHOLE = Shard()


def segments(total: int, size: int = 1) -> int:
    """The segments that one of `size` ranks has of a sum over `total` products; 1 when they cannot be cut in eight."""
    return SEGMENTS // size if total % (_UNIT * SEGMENTS) == 0 else 1


def obstacle(
    size: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int | None,
    experts: int | None,
    quantized: bool = False,
) -> str:
    """Why `size` ranks cannot share a model, "" when they can. inner: width of its dense feed-forward layers."""
    if size == 1:
        return ""
    if SEGMENTS % size:
        return f"ranks number 1, 2, 4 or {SEGMENTS}"
    if heads % size:
        return f"{heads} attention heads cannot be dealt out evenly"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads can neither be dealt out evenly nor be copied evenly"
    if experts is not None and experts < size:
        return f"there are only {experts} experts"
    multiple = SEGMENTS * (_QUANTIZED_UNIT if quantized else _UNIT)
    for total, what in ((heads * head_dim, "attention"), (inner, "feed-forward")):
        if total is not None and total % multiple:
            return f"the {total} columns of {what} are no multiple of {multiple}"
    return ""
