"""How one sequence is sampled: the normalised form that crosses processes. `sampling_parse` makes it."""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "regex", "ebnf", "structural_tag"]

GREEDY_BELOW = 1e-6  # a temperature under this means argmax, as in SGLang


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """What the output must match. `source` is the schema, expression or grammar as text."""

    kind: GrammarKind
    source: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Validated parameters of one sequence (n is expanded before). Defaults are SGLang's.

    max_new_tokens None means until the context ends. top_k 0 means the whole vocabulary. `seed` is always set by the
    time a request reaches the scheduler: a sample is a function of (logits, seed, position) and of nothing else.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    grammar: GrammarSpec | None = None
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int = 0
    stream_interval: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """True when the logits depend on the tokens seen so far."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0
