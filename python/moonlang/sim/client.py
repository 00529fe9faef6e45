"""One request seen from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

from moonlang.base.clock import NS_PER_MS
from moonlang.core.messages import StreamHead, TokenDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish
from moonlang.sim.workload import Script


@dataclass(slots=True)
class Client:
    """One request seen from outside: what was asked, and what has been delivered so far."""

    script: Script
    prompt: tuple[int, ...]
    sent_ns: int
    hung_up_ns: int | None = None
    stopped: bool = False  # its stop string has come: nothing more is to be delivered
    tokens: list[int] = field(default_factory=list)
    output: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    head: StreamHead | None = None
    finish: Finish | None = None

    @property
    def is_done(self) -> bool:
        """Nothing more may be delivered."""
        return self.stopped or self.finish is not None

    def take(self, delta: TokenDelta) -> None:
        """Note what has been delivered."""
        self.tokens.extend(delta.tokens)
        self.output.extend(delta.output)
        self.prompt_logprobs.extend(delta.prompt)
        self.head = self.head or delta.head
        self.finish = delta.finish

    def excuses(self, finish: Finish, *, now_ns: int, longest: int) -> bool:
        """Whether this client has given cause for an abort with this status. longest: tokens of prompt and output."""
        script = self.script
        match finish.status:
            case 499:
                return self.hung_up_ns is not None
            case 504:
                return script.timeout_ms > 0 and now_ns >= self.sent_ns + script.timeout_ms * NS_PER_MS
            case 500:
                return script.poison_at is not None
            case 400:
                grammar = script.sampling.grammar
                unfit = grammar is not None and grammar.kind == "ebnf"
                return unfit or not self.prompt or len(self.prompt) >= longest
            case _:
                return False
