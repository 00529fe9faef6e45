"""What the outside has still to hear of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from moonlang.core.messages import Generate, StreamHead, TokenDelta
from moonlang.core.plan import RowResult, TokenLogprob
from moonlang.core.request import Finish, Request


@dataclass(slots=True)
class Outbox:
    """Collects results of one request. When nobody looks at single tokens (no stream, no stop string to find) they are
    kept and delivered with the end: one message instead of hundreds."""

    message: Generate
    merged: bool = False
    told: bool = False  # the head has been sent
    tokens: list[int] = field(default_factory=list)
    output: list[TokenLogprob] = field(default_factory=list)
    prompt: list[TokenLogprob] = field(default_factory=list)

    @staticmethod
    def of(message: Generate) -> Outbox:
        sampling = message.sampling
        return Outbox(message, merged=not (message.stream or sampling.stop or sampling.stop_regex))

    def deliver(self, request: Request, outcome: RowResult | None, finish: Finish | None) -> TokenDelta | None:
        """The delta that tells of `outcome` and `finish`; None when it can wait or there is nothing to tell."""
        if outcome is not None and self.merged:
            self.tokens += outcome.tokens
            self.output += outcome.output
            self.prompt += outcome.prompt
        if finish is None and (self.merged or outcome is None or not (outcome.tokens or outcome.prompt)):
            return None
        head = None if self.told else self._head(request)
        self.told = True
        if self.merged or outcome is None:
            tokens, output, prompt = tuple(self.tokens), tuple(self.output), tuple(self.prompt)
        else:
            tokens, output, prompt = outcome.tokens, outcome.output, outcome.prompt
        return TokenDelta(request.rid, tokens, finish, head, output, prompt, request.retractions)

    def _head(self, request: Request) -> StreamHead:
        queue_ns = request.admitted_ns - request.arrival_ns if request.admitted_ns else 0
        return StreamHead(
            request.prompt_len,
            request.cached_tokens,
            self.message.stream,
            request.sampling,
            queue_ns,
            request.host_tokens,
            request.storage_tokens,
            request.tier_miss,
            self.message.dp_rank,
            request.handover,
            self.message.again,
            len(self.message.said),
        )
