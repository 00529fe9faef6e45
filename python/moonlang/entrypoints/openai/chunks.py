"""What chat and completion streams share: an event per delta and choice, most put together from prepared bytes."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from moonlang.core.messages import TextDelta
from moonlang.entrypoints import exchange
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.openai import shapes
from moonlang.entrypoints.openai.protocol import ChatRequest, CompletionRequest
from moonlang.entrypoints.openai.route import Envelope, wants_usage
from moonlang.entrypoints.openai.shapes import Tally
from moonlang.entrypoints.stream import merge


class Choices(Protocol):
    """The half of a stream that knows the dialect."""

    def plain(self, index: int, text: str) -> dict[str, Any]:
        """The choice of a chunk that brings nothing but text."""
        ...

    def render(self, chunks: Chunks, index: int, delta: TextDelta) -> bytes:
        """The events for one delta."""
        ...


class Chunks:
    """The exchange.Renderer of one call. samples: choices per prompt, which share the usage of that prompt."""

    def __init__(
        self,
        client: EngineClient,
        body: ChatRequest | CompletionRequest,
        envelope: Envelope,
        choices: Choices,
        *,
        count: int,
        samples: int,
    ) -> None:
        self._envelope = envelope
        self._choices = choices
        self._samples = samples
        self._cache_report = client.args.enable_cache_report
        self._usage_at_end, self.usage_always = wants_usage(client, body.stream_options)
        self._tallies = [Tally() for _ in range(count)]
        self._encode = msgspec.json.Encoder().encode
        self._fixed = [self._fixed_parts(index) for index in range(count)]

    def render(self, items: list[tuple[int, TextDelta]]) -> bytes:
        if len(items) == 1:
            return self._one(*items[0])
        by_index: dict[int, list[TextDelta]] = {}
        for index, delta in items:
            by_index.setdefault(index, []).append(delta)
        return b"".join(self._one(index, merge(deltas)) for index, deltas in by_index.items())

    def end(self) -> bytes:
        return exchange.event(self._envelope.chunk([], self._usage())) if self._usage_at_end else b""

    def text(self, index: int, text: str) -> bytes:
        """A chunk with nothing but text; only while `usage_always` is off."""
        before, after = self._fixed[index]
        return before + self._encode(text) + after

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """Any other chunk."""
        return exchange.event(self._envelope.chunk([choice], self._usage() if self.usage_always else None))

    def _one(self, index: int, delta: TextDelta) -> bytes:
        self._tallies[index].add(delta)
        return self._choices.render(self, index, delta)

    def _fixed_parts(self, index: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text of a plain chunk."""
        before, after = self.chunk(self._choices.plain(index, "\0")).split(b'"\\u0000"')
        return before, after

    def _usage(self) -> dict[str, Any]:
        return shapes.usage(self._tallies, self._samples, self._cache_report)
