"""As much of a request's body as routing needs, and the three fields that bring a pair together.

Bodies are passed on as they came, byte by byte: what the router does not know it cannot lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from moonlang.base.errors import RequestError

_EMPTY = msgspec.Raw()


class _Fields(msgspec.Struct):
    stream: Any = None
    text: msgspec.Raw = _EMPTY
    input_ids: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    tools: msgspec.Raw = _EMPTY
    messages: msgspec.Raw = _EMPTY
    return_logprob: Any = None
    logprob_start_len: Any = None
    echo: Any = None
    logprobs: Any = None


_fields = msgspec.json.Decoder(_Fields)
_items = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A body that is a JSON object. prompt: bytes of it that begin alike when prompts do.

    count: prompts in it; None when it is not a batch. prompt_logprobs: those of the prompt are asked for.
    """

    raw: bytes
    stream: bool
    prompt: bytes
    count: int | None
    prompt_logprobs: bool


def read(raw: bytes) -> Body:
    """Look at a body. RequestError 400 when it is not a JSON object."""
    try:
        fields = _fields.decode(raw)
        given = (bytes(field) for field in (fields.text, fields.input_ids, fields.prompt))
        prompts = next((field for field in given if field not in (b"", b"null")), b"")
        count = _count(prompts)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RequestError(f"The request body is not valid: {error}.") from None
    except RecursionError:
        raise RequestError("The request body is nested too deeply.") from None
    return Body(
        raw=raw,
        stream=bool(fields.stream),
        prompt=prompts or bytes(fields.tools) + bytes(fields.messages),
        count=count,
        prompt_logprobs=_prompt_logprobs(fields),
    )


def _count(prompts: bytes) -> int | None:
    """How many prompts a list holds; None for a single prompt: a string, or a list of token ids."""
    if not prompts.startswith(b"["):
        return None
    items = _items.decode(prompts)
    return len(items) if items and bytes(items[0])[:1] in (b'"', b"[") else None


def _prompt_logprobs(fields: _Fields) -> bool:
    if fields.echo and fields.logprobs is not None:
        return True
    wanted, starts = fields.return_logprob, fields.logprob_start_len
    starts = starts if isinstance(starts, list) else [starts]
    return bool(wanted) and any(isinstance(start, int) and start >= 0 for start in starts)


def with_fields(raw: bytes, fields: dict[str, Any]) -> bytes:
    """The body with these fields added, or put in the place of its own: the last of two equal keys counts."""
    head = raw.rstrip()[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + msgspec.json.encode(fields)[1:]


def place(host: str, port: int | None, rooms: Sequence[int], batched: bool) -> dict[str, Any]:
    """The fields that tell both servers of a pair where to meet; lists for a batch."""
    if not batched:
        return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": rooms[0]}
    count = len(rooms)
    return {"bootstrap_host": [host] * count, "bootstrap_port": [port] * count, "bootstrap_room": list(rooms)}
