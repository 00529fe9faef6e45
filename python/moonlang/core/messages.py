"""Everything that crosses a process: typed, tagged, bounded. Encoded by `messaging.codec` as msgpack arrays.

API server -> scheduler: Generate, Abort, Control.      scheduler -> detokenizer: TokenBatch.
detokenizer -> API server: TextBatch.                   detokenizer -> scheduler: StopHit.
scheduler -> API server: Reply.                         every role -> API server: Ready.
API servers among themselves: Control and Reply with a FrontVerb.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from moonlang.core.pairing import PeerSpec
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish, Handover, LogprobSpec
from moonlang.core.sampling import SamplingParams


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Generate(_Message, frozen=True):
    """One sequence to generate. `stream`: deltas are wanted; otherwise only the final text is sent to the client.
    peer: in a prefill or decode instance, where its other half is. dp_rank: the replica that is to serve it, or serves
    it; None: any, or there is one. again: how many replicas have been lost that served it before; said: what they said
    of its output, as far as the client has heard it, to go on from there."""

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    stream: bool = False
    logprob: LogprobSpec | None = None
    priority: int = 0
    extra_key: str = ""
    timeout_ms: int = 0  # 0: none
    peer: PeerSpec | None = None
    dp_rank: int | None = None
    again: int = 0
    said: tuple[int, ...] = ()


class Abort(_Message, frozen=True):
    """The client of `rid` is gone. A prefix match as in SGLang: every request whose id starts with `rid`.

    exact: only the request named `rid`; a client that hangs up must not take its neighbours "a1" and "a10" along.
    """

    rid: str
    abort_all: bool = False
    message: str = "Aborted by the client."
    exact: bool = False


class StopHit(_Message, frozen=True):
    """The detokenizer found a stop string; the request has already been answered, its pages can go."""

    rid: str


Verb = Literal["ping", "flush_cache", "state", "loads", "tree", "store", "attach_store", "detach_store", "clear_store"]
FrontVerb = Literal["open", "metrics", "drain", "fail", "lose"]  # what fronts ask of each other


class Control(_Message, frozen=True):
    """A management call, answered by one Reply with the same id."""

    id: int
    verb: Verb | FrontVerb
    args: dict[str, Any] = {}


class Reply(_Message, frozen=True):
    """Answer to a Control. `body` holds plain JSON values."""

    id: int
    ok: bool
    message: str = ""
    body: dict[str, Any] = {}


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New output tokens of one request. `head` comes with the first delta; the numbers are totals so far.

    Deltas of a request that does not stream may be merged: the last one carries `finish`.
    """

    rid: str
    tokens: tuple[int, ...]
    finish: Finish | None = None
    head: StreamHead | None = None
    output: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    retractions: int = 0


class StreamHead(msgspec.Struct, frozen=True, array_like=True):
    """What detokenizer and API server must know of a request once. queue_ns: time spent waiting to be admitted.
    host_tokens, storage_tokens: of cached_tokens, what the lower tiers brought; tier_miss: why the store brought
    nothing, "" when it did or there is none. dp_rank: the replica that serves it; None when there is one.
    handover: at a decode instance, how the prompt's pages came. again, said: see Generate; of `said` the number.
    """

    prompt_tokens: int
    cached_tokens: int
    stream: bool
    sampling: SamplingParams
    queue_ns: int = 0
    host_tokens: int = 0
    storage_tokens: int = 0
    tier_miss: str = ""
    dp_rank: int | None = None
    handover: Handover | None = None
    again: int = 0
    said: int = 0


class TokenBatch(_Message, frozen=True):
    """All deltas of one step."""

    items: tuple[TokenDelta, ...]


class TextDelta(msgspec.Struct, frozen=True, array_like=True):
    """New text of one request, ready for the client; `tokens` are the ids it stands for (only text is trimmed)."""

    rid: str
    text: str
    tokens: tuple[int, ...]
    finish: Finish | None = None
    head: StreamHead | None = None
    output: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    retractions: int = 0


class TextBatch(_Message, frozen=True):
    """All texts of one step for one API server."""

    items: tuple[TextDelta, ...]


class Ready(_Message, frozen=True):
    """A role is up. `body` holds what the API server reports of it (pool size, context length, ...)."""

    role: str
    pid: int
    body: dict[str, Any] = {}


Message = Generate | Abort | StopHit | Control | Reply | TokenBatch | TextBatch | Ready


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A message on its way. `seq` counts the messages from `source` to `to`, starting at 0, without gaps."""

    to: str
    source: str
    seq: int
    body: Message
