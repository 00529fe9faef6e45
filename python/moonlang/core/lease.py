"""Who holds which pages. Granted by `mem_cache`; every page has exactly one owner at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PrefixRef:
    """The cached prefix of a request: valid while its node is locked.

    node: opaque tree node; tokens: length on the device, a multiple of the page size.
    """

    node: Any
    tokens: int


@dataclass(slots=True)
class Lease:
    """The page table of one running request.

    pages: page id by index, the first `shared` of them owned by the tree (locked through `prefix`), the rest by this
    lease. Page i holds token positions [i * page_size, (i + 1) * page_size).

    lent: transfers read its pages, so none of its own goes; `spare` are those that left the page table meanwhile.
    """

    prefix: PrefixRef
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    lent: bool = False
    spare: list[int] = field(default_factory=list)
