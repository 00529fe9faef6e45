"""Log probabilities of the prompt: the prefill server computes them, the client reads the decode server's answer.

The native call keeps them apart from those of the output; the OpenAI completion with `echo` has them in one list, with
offsets into the text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from moonlang.base.errors import PeerError

INPUT_FIELDS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
LISTS = ("token_logprobs", "tokens", "top_logprobs")
MAX_EVENT_BYTES = 64 << 20
_EVENT_END = b"\n\n"
_DATA = b"data: "

Fill = Callable[[Any], None]  # changes a decoded answer, or one event of a stream of them, in place


def filler(path: str, prefill: bytes) -> Fill:
    """How to complete the decode server's answers from the prefill server's. PeerError when that is unfit."""
    try:
        answer = msgspec.json.decode(prefill)
        return _completion(answer) if path == "/v1/completions" else _native(answer)
    except (msgspec.DecodeError, LookupError, TypeError, UnicodeError) as error:
        raise PeerError("The prefill server's answer has no log probabilities.") from error


def whole(fill: Fill, body: bytes) -> bytes:
    """A whole answer, completed."""
    answer = msgspec.json.decode(body)
    fill(answer)
    return msgspec.json.encode(answer)


async def events(fill: Fill, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream of events, each of them completed."""
    rest = b""
    async for piece in pieces:
        *done, rest = (rest + piece).split(_EVENT_END)
        if len(rest) > MAX_EVENT_BYTES:
            raise PeerError("The decode server's answer holds an event without an end.")
        if done:
            yield b"".join(_event(fill, event) for event in done)
    yield rest


def _event(fill: Fill, event: bytes) -> bytes:
    payload = event.strip().removeprefix(_DATA)
    if not payload.startswith(b"{"):
        return event + _EVENT_END
    return _DATA + whole(fill, payload) + _EVENT_END


def _native(answer: Any) -> Fill:
    metas = [one["meta_info"] for one in (answer if isinstance(answer, list) else [answer])]

    def fill(found: Any) -> None:
        batch = found if isinstance(found, list) else [found]
        for position, one in enumerate(batch):
            if "meta_info" not in one:
                continue  # an error
            source = metas[one.get("index", position)]
            target = one["meta_info"]
            for name in INPUT_FIELDS:
                if len(source.get(name) or ()) > len(target.get(name) or ()):
                    target[name] = source[name]

    return fill


def _completion(answer: Any) -> Fill:
    """The prefill server's lists end with its one output token, and the offset of that is where the output begins."""
    prompts: dict[int, dict[str, Any]] = {choice["index"]: choice["logprobs"] for choice in answer["choices"]}
    starts = {index: lists["text_offset"][-1] for index, lists in prompts.items()}
    begun: set[int] = set()

    def fill(found: Any) -> None:
        for choice in found.get("choices", ()):
            index, lists = choice["index"], choice.get("logprobs")
            if not lists:
                continue
            lists["text_offset"] = [offset + starts[index] for offset in lists["text_offset"]]
            if index not in begun:
                begun.add(index)
                _prepend(prompts[index], lists)

    return fill


def _prepend(prompt: dict[str, Any], lists: dict[str, Any]) -> None:
    lists["text_offset"] = prompt["text_offset"][:-1] + lists["text_offset"]
    for name in LISTS:
        if lists.get(name) is not None:
            lists[name] = prompt[name][:-1] + lists[name]
