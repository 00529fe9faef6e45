"""A rank's place among those who compute one model together."""

from __future__ import annotations

import msgspec


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Rank `rank` of `size`.

    meeting: where the ranks exchange numbers: the path of a file that is theirs alone (one host), or
    "tcp://host:port". plans: where rank 0 hands out its plans: the path of a socket, or "tcp://host:port".
    patience_s: how long a rank that lives is waited for. local_size: ranks on this host.
    """

    rank: int
    size: int
    meeting: str
    plans: str
    backend: str
    patience_s: float = 300.0
    local_size: int = 1
