"""From the message to the request: what it may ask for at most, and why it may be refused at the door."""

from __future__ import annotations

from moonlang.core.messages import Generate
from moonlang.core.request import Finish, Request
from moonlang.scheduler.settings import NS_PER_MS


def make_request(message: Generate, *, now_ns: int, order: int, longest: int, mode: str = "") -> Request:
    """longest: tokens of prompt and output together that one request may have. mode: of the instance, in a pair."""
    wanted = message.sampling.max_new_tokens
    if mode == "prefill" and message.peer is not None:
        wanted = 1 if wanted is None else min(wanted, 1)
    return Request(
        rid=message.rid,
        prompt=message.input_ids,
        tokens=[*message.input_ids, *message.said],
        sampling=message.sampling,
        arrival_ns=now_ns,
        deadline_ns=now_ns + message.timeout_ms * NS_PER_MS if message.timeout_ms else None,
        extra_key=message.extra_key,
        priority=message.priority,
        logprob=message.logprob,
        order=order,
        peer=message.peer if mode else None,
        retractions=message.again,
        max_total=longest if wanted is None else min(longest, len(message.input_ids) + wanted),
    )


def refusal(request: Request, *, longest: int, twin: bool, full: bool) -> Finish | None:
    """Why `request` cannot be taken, or None. twin: its id is in use; full: the queue has no place."""
    length = request.prompt_len
    if twin:
        return _refuse(400, f"A request with the id {request.rid!r} is already running. Use a new id.")
    if length == 0:
        return _refuse(400, "The prompt is empty. Send at least one token.")
    if length >= longest:
        text = f"Input length ({length} tokens) exceeds the maximum allowed length ({longest - 1} tokens). "
        return _refuse(400, text + "Use a shorter input or enable --allow-auto-truncate.")
    return _refuse(503, "The request queue is full.") if full else None


def _refuse(status: int, text: str) -> Finish:
    return Finish("abort", message=text, status=status)
