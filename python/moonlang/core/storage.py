"""What the tiers below the device pool are asked to do. Every op is a ticket; a failed one is a cache miss.

Two channels: `HostPool` copies pages between the device pool and the host pool of the same process, `KvStore` moves
them between the device pool and a store that all instances of a model share. Pages named in an op stay pinned until its
completion. Everything is cut at the first page that fails: `Completion.count` says how many leading pages are good,
`error` why not all.
"""

from __future__ import annotations

import msgspec


class Demote(msgspec.Struct, frozen=True, kw_only=True):
    """Copy device `pages` to host `slots`, pairwise, and keep a checksum of each."""

    pages: tuple[int, ...]
    slots: tuple[int, ...]


class Promote(msgspec.Struct, frozen=True, kw_only=True):
    """Copy host `slots` to device `pages`, pairwise. A slot whose checksum differs fails."""

    slots: tuple[int, ...]
    pages: tuple[int, ...]


HostOp = Demote | Promote


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """How many leading `keys` are in the store? An answer is a hint: a later Load may find less."""

    keys: tuple[bytes, ...]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Read the pages named `keys` into device `pages`, pairwise. A page counts when its manifest fits and its checksum
    holds; what lies in the pages behind the count is undefined."""

    keys: tuple[bytes, ...]
    pages: tuple[int, ...]
    deadline_ns: int


class Save(msgspec.Struct, frozen=True, kw_only=True):
    """Put device `pages` under `keys`, pairwise. Pages that are there already count as stored."""

    keys: tuple[bytes, ...]
    pages: tuple[int, ...]


class Clear(msgspec.Struct, frozen=True, kw_only=True):
    """Forget every page of this model that this store holds."""


StoreOp = Probe | Load | Save | Clear
