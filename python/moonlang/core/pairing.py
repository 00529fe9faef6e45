"""What a prefill and a decode instance say to each other: typed, idempotent, named by room.

One request is served by a pair. The router draws a room, sends the request to both, and they find each other:

    decode  -> prefill   Want      destination pages are leased: push here, leave out what the cache already holds
    prefill -> decode    Noted     the Want has been read
    prefill -> decode    Pushed    one push has landed; its checksum
    prefill -> decode    Landed    the last one: manifest, first token; decode may start once all of it is verified
    decode  -> prefill   Release   all is well or nothing is wanted any more: forget the room
    prefill -> decode    Drained   no write of this room is under way or will come: its pages may be used again
    prefill -> decode    Refuse    this room fails, and why; first failure ends the pair

Want, Landed, Refuse and Release are repeated until they are answered, so a lost message costs a repeat and a repeated
one nothing: Want is answered by any message about its room, Landed (with it every Pushed is repeated) and Refuse by
Release, Release by Drained. A room that is not known any more answers with the last word of its protocol: Drained to
Release, Release to Landed and Refuse. A Want for a room that is not known is kept for a while: its request may be late.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from moonlang.core.kv import KvRegion
from moonlang.core.plan import TokenLogprob

NO_TOKEN = -1


class PeerSpec(msgspec.Struct, frozen=True, array_like=True):
    """Where the prefill half of a request is to be found: its bootstrap address, and the room of the pair."""

    host: str
    port: int
    room: int


class KvCard(msgspec.Struct, frozen=True, kw_only=True):
    """All a peer must know to write into the pools of one instance; exchanged when two instances connect.

    instance: drawn anew at every start, so that a successor behind the same address is another peer (its epoch).
    backend: name of the transfer backend. host: equal for processes that can map each other's memory.
    regions and sessions: one entry per rank, which holds a part of every page; a session is what the backend dials, a
    handle what a peer on the same host maps ("" when it cannot).
    """

    instance: str
    backend: str
    host: str
    regions: tuple[KvRegion, ...]
    sessions: tuple[str, ...]
    handles: tuple[str, ...]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [source, source + size) of a source page are bytes [target, target + size) of its target page."""

    source: int
    target: int
    size: int


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """Write `spans` of the pages `source` of this instance's pool to the pages `target`, pairwise, of `peer`'s.

    The completion's `value` is the checksum of the bytes as they were read, page by page and span by span. Source
    pages stay pinned until it arrives, whatever it says. deadline_ns: fail by then.
    """

    room: int
    peer: KvCard
    source: tuple[int, ...]
    target: tuple[int, ...]
    spans: tuple[Span, ...]
    deadline_ns: int
    source_rank: int = 0
    target_rank: int = 0


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    """Checksum what has landed: `spans` (by their target side) of the local pages `pages`, in the order of the push."""

    room: int
    pages: tuple[int, ...]
    spans: tuple[Span, ...]
    rank: int = 0


TransferOp = Push | Verify


class Want(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """pages: where the prompt's pages from `first_page` on go; those before are in decode's cache.

    key: chained key of the whole prompt, so that two requests under one room are noticed. patience_ms: how long
    decode will wait for Landed from now. serial: number of the pair at its decode instance, never used again; every
    message about the pair carries it, so that one that comes late does not meddle with the room's next use.
    """

    room: int
    prompt_len: int
    key: bytes
    first_page: int
    pages: tuple[int, ...]
    patience_ms: int
    serial: int = 0


class Noted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The Want of this room has been read: it need not be repeated soon."""

    room: int
    serial: int = 0


class Pushed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Push number `index` of the room has landed: `spans` of the wanted pages [at, at + count)."""

    room: int
    index: int
    at: int
    count: int
    spans: tuple[Span, ...]
    checksum: int
    rank: int = 0
    serial: int = 0


class Landed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Everything is there: pushes 0 .. pushes - 1 cover every wanted page whole.

    key, digest: of the prompt and of the schema (weights, dtype, layout) that computed it. token: the first sampled
    one (NO_TOKEN when none is wanted), with its log probability when asked for. ended: it completes the grammar.
    For the client's receipt: cached tokens, and of these what lower tiers brought; queue_ns: from both halves being
    there to admission, compute_ns: from then to the last computed token.
    """

    room: int
    pushes: int
    key: bytes
    digest: str
    token: int
    output: tuple[TokenLogprob, ...] = ()
    ended: bool = False
    cached_tokens: int = 0
    serial: int = 0
    host_tokens: int = 0
    storage_tokens: int = 0
    tier_miss: str = ""
    queue_ns: int = 0
    compute_ns: int = 0


class Release(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Decode needs nothing more of this room; `error` says why when it did not get what it wanted."""

    room: int
    error: str = ""
    serial: int = 0


class Drained(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No write of this room is under way, and none will be."""

    room: int
    serial: int = 0


class Refuse(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """This room fails; said by prefill. status: what the client may be told; 503: trying again is worth it."""

    room: int
    error: str
    status: int = 503
    serial: int = 0


PairMessage = Want | Noted | Pushed | Landed | Release | Drained | Refuse


class Linked(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to PeerLink.open: the room's prefill instance has been found and is connected."""

    room: int
    card: KvCard


class Unreachable(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answer to PeerLink.open: nobody there, or nobody who fits (page size, dtype, weights)."""

    room: int
    error: str


class Heard(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A message from a connected instance. Within one connection they come in order and once; `card`: its sender."""

    card: KvCard
    body: PairMessage


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An instance is out of reach. fate "gone": its process has ended and no write of it is on its way any more;
    "silent": it may come back and may still write. A silent one is followed by Heard (it is back) or by gone.
    """

    instance: str
    fate: Literal["silent", "gone"]


PairEvent = Linked | Unreachable | Heard | Lost
