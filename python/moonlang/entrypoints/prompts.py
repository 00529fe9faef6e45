"""From prompts to `Generate` messages: token ids checked against vocabulary and context, samples expanded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from moonlang.base import clock
from moonlang.base.errors import RequestError
from moonlang.core.messages import Generate
from moonlang.core.request import LogprobSpec
from moonlang.core.sampling import SamplingParams
from moonlang.core.sampling_parse import INT32_MAX, derive_seed, parse_sampling, shown
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.pairing import Rooms

MAX_SEQUENCES_PER_CALL = 4096  # prompts times samples
MAX_RID_CHARS = 256
MAX_LOGPROB_CHOICES = 1024  # alternatives per position
MAX_PROMPT_LOGPROBS = 2_000_000  # numbers: they travel in few messages, which have a size limit
MAX_KEY_CHARS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt with everything its samples share. sampling: as the user sent it; rid: "" for one of our own."""

    ids: list[int]
    sampling: Mapping[str, Any] | None
    defaults: Mapping[str, Any] | None = None
    logprob: LogprobSpec | None = None
    rid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What all sequences of a call share."""

    stream: bool = False
    priority: int | None = None
    extra_key: str = ""
    rooms: Rooms | None = None
    dp_rank: int | None = None


async def token_ids(client: EngineClient, prompt: str | list[Any]) -> list[int]:
    """A prompt, text or ids, as ids of the vocabulary. RequestError 400 otherwise."""
    if isinstance(prompt, str):
        ids = await client.encode(prompt)
    else:
        ids = checked_ids(prompt, client.model.vocab_size, "input_ids")
    if not ids:
        raise RequestError("The prompt is empty: it must hold at least one token.")
    return ids


def checked_ids(value: Any, vocab_size: int, name: str) -> list[int]:
    """A user's list as token ids of the vocabulary."""
    try:
        ids = msgspec.convert(value, list[int])
    except msgspec.ValidationError as error:
        raise RequestError(f"{name} must be a list of token ids ({error}).") from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"{name} must hold token ids in [0, {vocab_size - 1}], got {shown(wrong)}.")
    return ids


def expand(client: EngineClient, prompts: Sequence[Prompt], common: Common) -> list[Generate]:
    """The sequences of a call, the samples of one prompt side by side.

    RequestError 400 for sampling parameters, lengths and numbers of samples that cannot be served.
    """
    priority = checked_priority(client, common.priority)
    timeout_ms = round((client.args.request_timeout_s or 0) * clock.NS_PER_S / clock.NS_PER_MS)
    messages: list[Generate] = []
    samples: list[int] = []
    for prompt in prompts:
        params, n = parse_sampling(
            prompt.sampling,
            vocab_size=client.model.vocab_size,
            fresh_seed=client.fresh_seed(),
            defaults=prompt.defaults if prompt.defaults is not None else client.args.preferred_sampling_params,
        )
        if len(messages) + n > MAX_SEQUENCES_PER_CALL:
            raise RequestError(f"One call can ask for at most {MAX_SEQUENCES_PER_CALL} sequences.")
        asked = (prompt.sampling or {}).get("max_new_tokens") is not None
        ids, params = fit(client, prompt.ids, params, asked)
        rid = prompt.rid or client.fresh_rid()
        messages += [
            Generate(
                rid=rid if n == 1 else f"{rid}_{sample}",
                input_ids=ids,
                sampling=reseeded(params, sample),
                stream=common.stream,
                logprob=prompt.logprob,
                priority=priority,
                extra_key=common.extra_key,
                timeout_ms=timeout_ms,
                dp_rank=common.dp_rank,
            )
            for sample in range(n)
        ]
        samples.append(n)
    if common.rooms is not None:
        peers = common.rooms.peers(samples)
        messages = [msgspec.structs.replace(one, peer=peer) for one, peer in zip(messages, peers, strict=True)]
    return messages


def reseeded(params: SamplingParams, sample: int) -> SamplingParams:
    """The parameters of sample `sample`: the same but for the seed."""
    if sample == 0:
        return params
    return msgspec.structs.replace(params, seed=derive_seed(params.seed, sample))


def fit(client: EngineClient, ids: list[int], params: SamplingParams, asked: bool) -> tuple[list[int], SamplingParams]:
    """Check the lengths against the context, or cut them to it with --allow-auto-truncate.

    asked: the user named max_new_tokens; a default that does not fit is simply cut short by the scheduler.
    """
    context, truncate = client.model.context_length, client.args.allow_auto_truncate
    if len(ids) >= context:
        if not truncate:
            raise RequestError(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({context} tokens)."
            )
        ids = ids[: context - 1]
    wanted = params.max_new_tokens
    if asked and wanted is not None and len(ids) + wanted > context:
        if not truncate:
            raise RequestError(
                f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested "
                f"a total of {len(ids) + wanted} tokens: {len(ids)} tokens from the input messages and {wanted} tokens "
                "for the completion. Please reduce the number of tokens in the input messages or the completion to fit "
                "within the limit."
            )
        params = msgspec.structs.replace(params, max_new_tokens=context - len(ids))
    return ids, params


def checked_priority(client: EngineClient, priority: int | None) -> int:
    """The priority that a request gets."""
    args = client.args
    if not args.enable_priority_scheduling:
        if priority is not None and args.abort_on_priority_when_disabled:
            raise RequestError("priority cannot be set: this server runs without --enable-priority-scheduling.")
        return 0
    if priority is None:
        return args.default_priority_value or 0
    if abs(priority) > INT32_MAX:
        raise RequestError(f"priority must be an integer in [-{INT32_MAX}, {INT32_MAX}], got {shown(priority)}.")
    return priority


def checked_rid(value: str, name: str = "rid") -> str:
    """A user's request id; "" when there is none."""
    if len(value) > MAX_RID_CHARS:
        raise RequestError(f"{name} must be at most {MAX_RID_CHARS} characters long, got {len(value)}.")
    return value


def cache_key(cache_salt: str | None, extra_key: str | None) -> str:
    """Requests share cached KV only under the same key; the two parts cannot be mistaken for one another."""
    if len(cache_salt or "") > MAX_KEY_CHARS or len(extra_key or "") > MAX_KEY_CHARS:
        raise RequestError(f"cache_salt and extra_key must be at most {MAX_KEY_CHARS} characters long.")
    if not cache_salt and not extra_key:
        return ""
    return f"{len(cache_salt or '')}:{cache_salt or ''}{extra_key or ''}"


def logprob_spec(client: EngineClient, prompt_len: int, *, start: int, top: int, ids: Sequence[int]) -> LogprobSpec:
    """Which log probabilities to compute. start: -1 for output only."""
    vocab = client.model.vocab_size
    if len(ids) > MAX_LOGPROB_CHOICES:
        raise RequestError(f"token_ids_logprob must hold at most {MAX_LOGPROB_CHOICES} token ids, got {len(ids)}.")
    if not -1 <= start <= prompt_len:
        raise RequestError(f"logprob_start_len must be in [-1, {prompt_len}], got {shown(start)}.")
    most = min(vocab, MAX_LOGPROB_CHOICES)
    if not 0 <= top <= most:
        raise RequestError(f"top_logprobs_num must be in [0, {most}], got {shown(top)}.")
    entries = (prompt_len - start) * (1 + top + len(ids)) if start >= 0 else 0
    if entries > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"Log probabilities of this prompt would be {entries} numbers, more than {MAX_PROMPT_LOGPROBS}.",
            hint="Ask for fewer alternatives, or set logprob_start_len further on.",
        )
    return LogprobSpec(start=start, top=top, ids=tuple(checked_ids(list(ids), vocab, "token_ids_logprob")))
