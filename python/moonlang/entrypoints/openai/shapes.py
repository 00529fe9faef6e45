"""The parts that OpenAI's answers are made of: usage, finish reasons, log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moonlang.core.messages import TextDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish

TokenText = Callable[[int], str | None]


class Tally:
    """Token counts of one sequence, from its deltas."""

    __slots__ = ("cached", "output", "prompt")

    def __init__(self) -> None:
        self.prompt = 0
        self.cached = 0
        self.output = 0

    def add(self, delta: TextDelta) -> None:
        if delta.head is not None:
            self.prompt, self.cached = delta.head.prompt_tokens, delta.head.cached_tokens
        self.output += len(delta.tokens)


def usage(tallies: Sequence[Tally], n: int, cache_report: bool) -> dict[str, Any]:
    """Usage of a call whose sequences come in groups of n samples; a prompt counts once per group."""
    prompts = tallies[::n]
    prompt = sum(tally.prompt for tally in prompts)
    output = sum(tally.output for tally in tallies)
    details = {"cached_tokens": sum(tally.cached for tally in prompts)} if cache_report else None
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + output,
        "completion_tokens": output,
        "prompt_tokens_details": details,
        "reasoning_tokens": 0,
    }


def matched_stop(finish: Finish | None) -> int | str | None:
    """The stop token or stop string that ended the sequence."""
    return finish.matched if finish is not None and finish.kind == "stop" else None


def chat_logprobs(entries: Sequence[TokenLogprob], text_of: TokenText) -> dict[str, Any]:
    """Log probabilities in the shape of chat completions."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text = text_of(token) or ""
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(token, value) for value, token in entry.top]}
        for entry in entries
    ]
    return {"content": content}


class LegacyLogprobs:
    """Log probabilities in the shape of text completions; offsets count characters from the start of the answer."""

    def __init__(self, text_of: TokenText, with_top: bool) -> None:
        self._text_of = text_of
        self._with_top = with_top
        self._offset = 0

    def take(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The lists for these entries, which follow those of the call before."""
        texts = [self._text_of(entry.token) or "" for entry in entries]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [entry.logprob for entry in entries],
            "tokens": texts,
            "top_logprobs": [self._top(entry) for entry in entries] if self._with_top else None,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        return {self._text_of(token) or "": value for value, token in entry.top}
