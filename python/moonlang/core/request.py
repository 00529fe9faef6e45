"""The request as the scheduler sees it. One owner, the Scheduler; everybody else gets frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from moonlang.core.lease import Lease
from moonlang.core.page_key import PageKeys
from moonlang.core.sampling import SamplingParams

if TYPE_CHECKING:
    from moonlang.core.pairing import PeerSpec


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a sequence ended. `matched`: the stop token id or stop string; `status`: an HTTP status, with abort."""

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int = 0
    message: str = ""
    status: int = 0


class LogprobSpec(msgspec.Struct, frozen=True, array_like=True):
    """Which log probabilities a request wants. `start` is the first prompt position reported (-1: output only)."""

    start: int = -1
    top: int = 0
    ids: tuple[int, ...] = ()


class Handover(msgspec.Struct, frozen=True, array_like=True):
    """How a decode instance came by a prompt. pairing_ns: from arrival until pages were asked for; moving_ns: from then
    to the last verified page, queue_ns and compute_ns of it at the prefill instance. tokens: of the pages asked for."""

    pairing_ns: int
    moving_ns: int
    queue_ns: int
    compute_ns: int
    tokens: int


class State(Enum):
    """Where a request is. There is no prefill state and decode state: a running request catches up with its tokens."""

    GRAMMAR = "grammar"  # waits for its grammar to be compiled
    WAITING = "waiting"  # in the queue; holds no pages
    PAIRING = "pairing"  # waits for its other half, prefill for decode's Want and decode for pages; holds nothing
    RUNNING = "running"  # has a slot and a lease
    PUSHING = "pushing"  # prefill: all is computed, the lease is kept until its pages have been sent
    LANDING = "landing"  # decode: has a lease that a prefill instance writes to
    LANDED = "landed"  # decode: the prompt's pages are there, waits for a slot
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence. Times are `now_ns` of the driver. Fields below the line are written by the Scheduler only."""

    rid: str
    prompt: list[int]
    sampling: SamplingParams
    arrival_ns: int
    extra_key: str = ""  # cache salt, LoRA: requests share KV only under the same key
    priority: int = 0
    deadline_ns: int | None = None
    logprob: LogprobSpec | None = None
    order: int = 0  # arrival number, the last tie-breaker of every policy
    peer: PeerSpec | None = None  # where its other half is; None: served here alone
    # ---
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)  # prompt + output known so far
    max_total: int = 0  # len(tokens) at which the request ends by length
    slot: int = -1
    epoch: int = -1  # number of its admission; a result of another epoch is void
    admitted: int = 0  # len(tokens) at admission: tokens behind that were sampled in the present slot
    admitted_ns: int = 0  # time of the first admission
    lease: Lease | None = None
    scheduled: int = 0  # positions whose KV is in some plan, committed or in flight
    computed: int = 0  # positions whose KV a committed plan has written
    pending: int = 0  # samples in flight whose token is not known yet
    cached_tokens: int = 0  # prompt tokens taken from the cache at first admission
    sent_pages: int = 0  # entries of the lease's page table that the executor already knows
    last_plan: int = -1  # id of the newest plan with a row of this request
    retractions: int = 0
    keys: PageKeys | None = None  # names of its pages, where lower tiers want them
    fetch: Any = None  # what the lower tiers bring up for it: of mem_cache.tiers
    host_tokens: int = 0  # of cached_tokens, what came from the host tier ...
    storage_tokens: int = 0  # ... and from the store
    tier_miss: str = ""  # why the store brought nothing
    handover: Handover | None = None  # decode: how its pages came
    bound: bool = False  # prefill: a decode instance waits for its pages, so it is the last to be retracted
    finish: Finish | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that may still be sampled beyond those known or in flight."""
        return self.max_total - len(self.tokens) - self.pending
