"""The native call, without HTTP: from the object that /generate takes to answers as plain dicts; `Engine` uses it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from moonlang.base import clock
from moonlang.base.errors import RequestError
from moonlang.core.messages import Generate, TextDelta
from moonlang.core.plan import TokenLogprob
from moonlang.core.request import Finish, LogprobSpec
from moonlang.entrypoints import errors, pairing, prompts
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.pairing import PairFields
from moonlang.entrypoints.prompts import Common, Prompt
from moonlang.entrypoints.receipt import Receipt


class GenerateBody(PairFields, kw_only=True):
    """What /generate understands; other keys are ignored. Where `list` stands, one value per prompt is allowed."""

    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any] | None] | None = None
    rid: str | list[str] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool | None] | None = None
    logprob_start_len: int | list[int | None] | None = None
    top_logprobs_num: int | list[int | None] | None = None
    token_ids_logprob: list[Any] | None = None
    return_text_in_logprobs: bool | None = None
    return_prompt_token_ids: bool | None = None
    priority: int | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    # What this version cannot do is refused, not overlooked.
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    session_params: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    return_entropy: Any = None
    return_sampling_mask: Any = None
    return_flat_raw_top_logprobs: Any = None


REFUSED = (
    *("input_embeds", "image_data", "video_data", "audio_data", "lora_path", "session_params", "return_hidden_states"),
    *("return_routed_experts", "return_entropy", "return_sampling_mask", "return_flat_raw_top_logprobs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A checked call. batched: the answer is a list."""

    messages: list[Generate]
    batched: bool
    stream: bool
    text_in_logprobs: bool = False
    prompt_ids: bool = False

    def answers(self, client: EngineClient) -> list[Answer]:
        """An empty answer for each sequence."""
        return [Answer(client, self, message) for message in self.messages]


async def prepare(client: EngineClient, body: GenerateBody) -> Call:
    """Check a call, tokenise it and expand it into its sequences. RequestError 400 on anything wrong with it."""
    refuse_unsupported(body, REFUSED, client)
    texts, batched = _prompts(body)
    count = len(texts)
    sampling = _each("sampling_params", body.sampling_params, count, batched)
    specs = _LogprobFields(body, count, batched)
    rids = _rids(body.rid, count, batched)
    asked: list[Prompt] = []
    for index, text in enumerate(texts):
        ids = await prompts.token_ids(client, text)
        logprob = specs.spec(client, index, len(ids))
        asked.append(Prompt(ids=ids, sampling=sampling[index], logprob=logprob, rid=rids[index]))
    stream = bool(body.stream)
    key = prompts.cache_key(body.cache_salt, body.extra_key)
    rooms = pairing.rooms(client.args, body)
    common = Common(
        stream=stream,
        priority=body.priority,
        extra_key=key,
        rooms=rooms,
        dp_rank=pairing.dp_rank(client.args, body),
    )
    messages = prompts.expand(client, asked, common)
    return Call(
        messages=messages,
        batched=batched or len(messages) > 1,
        stream=stream,
        text_in_logprobs=bool(body.return_text_in_logprobs),
        prompt_ids=bool(body.return_prompt_token_ids),
    )


def refuse_unsupported(body: msgspec.Struct, names: tuple[str, ...], client: EngineClient) -> None:
    """RequestError 400 when a field that would change the answer is set and cannot be honoured."""
    for name in names:
        if getattr(body, name):
            raise RequestError(f"{name} is not supported by this server.")
    if getattr(body, "custom_logit_processor", None):
        if not client.args.enable_custom_logit_processor:
            raise RequestError("custom_logit_processor needs a server started with --enable-custom-logit-processor.")
        raise RequestError("custom_logit_processor is not supported: this server runs no code sent by clients.")


def _prompts(body: GenerateBody) -> tuple[list[str | list[Any]], bool]:
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("Exactly one of text and input_ids must be given.")
    if body.text is not None:
        return ([body.text], False) if isinstance(body.text, str) else (_some("text", list(body.text)), True)
    ids = body.input_ids or []
    if ids and isinstance(ids[0], list):
        if not all(isinstance(item, list) for item in ids):
            raise RequestError("input_ids must be a list of token ids, or a list of such lists.")
        return _some("input_ids", ids), True
    return [ids], False


def _some(name: str, items: list[Any]) -> list[Any]:
    if not items:
        raise RequestError(f"{name} must hold at least one prompt.")
    if len(items) > prompts.MAX_SEQUENCES_PER_CALL:
        raise RequestError(f"{name} must hold at most {prompts.MAX_SEQUENCES_PER_CALL} prompts, got {len(items)}.")
    return items


def _each(name: str, value: Any, count: int, batched: bool) -> list[Any]:
    """A field as one value per prompt."""
    if not isinstance(value, list):
        return [value] * count
    if not batched or len(value) != count:
        raise RequestError(f"{name} must be one value or a list of {count} values, one per prompt, got {len(value)}.")
    return value


def _rids(value: str | list[str] | None, count: int, batched: bool) -> list[str]:
    if value is None:
        return [""] * count
    if isinstance(value, str):
        rid = prompts.checked_rid(value)
        return [f"{rid}_{index}" for index in range(count)] if batched and rid else [rid] * count
    return [prompts.checked_rid(rid) for rid in _each("rid", value, count, batched)]


class _LogprobFields:
    """The four log probability fields of a call, per prompt."""

    def __init__(self, body: GenerateBody, count: int, batched: bool) -> None:
        self._wanted = _each("return_logprob", body.return_logprob, count, batched)
        self._start = _each("logprob_start_len", body.logprob_start_len, count, batched)
        self._top = _each("top_logprobs_num", body.top_logprobs_num, count, batched)
        ids = body.token_ids_logprob
        nested = bool(ids) and all(item is None or isinstance(item, list) for item in ids or ())
        self._ids = _each("token_ids_logprob", ids, count, batched) if nested else [ids] * count

    def spec(self, client: EngineClient, index: int, prompt_len: int) -> LogprobSpec | None:
        if not self._wanted[index]:
            return None
        start = self._start[index]
        return prompts.logprob_spec(
            client,
            prompt_len,
            start=-1 if start is None else start,
            top=self._top[index] or 0,
            ids=self._ids[index] or (),
        )


class Answer:
    """The answer of one sequence, as it grows."""

    def __init__(self, client: EngineClient, call: Call, message: Generate) -> None:
        self._client = client
        self._call = call
        self._message = message
        self._receipt = Receipt()
        self._text = ""
        self._new_text = ""
        self._ids: list[int] = []
        self._new_ids: list[int] = []
        self._retractions = 0
        self._finish: Finish | None = None
        self._logprobs = None if message.logprob is None else _Logprobs(client, call, message.logprob)

    def add(self, delta: TextDelta) -> None:
        self._receipt.add(delta)
        self._text += delta.text
        self._new_text += delta.text
        self._ids.extend(delta.tokens)
        self._new_ids.extend(delta.tokens)
        self._finish = delta.finish
        self._retractions = delta.retractions
        if self._logprobs is not None:
            self._logprobs.add(delta.prompt, delta.output)

    def body(self, *, incremental: bool = False) -> dict[str, Any]:
        """The answer so far, or with `incremental` what is new in text and ids since the last call."""
        answer: dict[str, Any] = {
            "text": self._new_text if incremental else self._text,
            "output_ids": self._new_ids if incremental else self._ids.copy(),
        }
        if self._call.prompt_ids:
            answer["prompt_token_ids"] = self._message.input_ids
        answer["meta_info"] = self._meta()
        self._new_text, self._new_ids = "", []
        return answer

    def _meta(self) -> dict[str, Any]:
        args = self._client.args
        meta: dict[str, Any] = {
            "id": self._message.rid,
            "finish_reason": finish_reason(self._finish),
            "prompt_tokens": len(self._message.input_ids),
            "weight_version": args.weight_version,
            "num_retractions": self._retractions,
        }
        if self._logprobs is not None:
            meta.update(self._logprobs.fields())
        meta["reasoning_tokens"] = 0
        meta["completion_tokens"] = len(self._ids)
        meta["cached_tokens"] = self._receipt.head.cached_tokens if self._receipt.head is not None else 0
        if self._finish is not None:
            self._add_final(meta)
        return meta

    def _add_final(self, meta: dict[str, Any]) -> None:
        receipt, elapsed_ns = self._receipt, self._receipt.elapsed_ns()
        version = self._client.args.weight_version
        meta["weight_versions"] = [{"version": version, "start": 0, "end": len(self._ids)}]
        meta["cached_tokens_details"] = receipt.cached_details(self._client.args)
        meta["dp_rank"] = receipt.head.dp_rank if receipt.head is not None else None
        meta["receipt"] = receipt.fields(self._client.page_size, elapsed_ns)
        meta["e2e_latency"] = elapsed_ns / clock.NS_PER_S
        meta["response_sent_to_client_ts"] = clock.wall_s()
        if self._client.metrics is not None:
            meta["queue_time"] = (receipt.head.queue_ns if receipt.head is not None else 0) / clock.NS_PER_S
            if receipt.first_token_ns and self._call.stream:
                meta["first_token_latency"] = receipt.first_token_ns / clock.NS_PER_S
                decode_ns = elapsed_ns - receipt.first_token_ns
                meta["decode_throughput"] = (len(self._ids) - 1) * clock.NS_PER_S / decode_ns if decode_ns else None


class _Logprobs:
    """The log probability lists of one answer: (logprob, token id, text or null) per entry."""

    def __init__(self, client: EngineClient, call: Call, spec: LogprobSpec) -> None:
        self._client = client
        self._with_text = call.text_in_logprobs
        self._spec = spec
        self._fields: dict[str, list[Any]] = {}
        for side in ("input", "output") if spec.start >= 0 else ("output",):
            self._fields[f"{side}_token_logprobs"] = []
            if spec.top:
                self._fields[f"{side}_top_logprobs"] = []
            if spec.ids:
                self._fields[f"{side}_token_ids_logprobs"] = []

    def add(self, prompt: tuple[TokenLogprob, ...], output: tuple[TokenLogprob, ...]) -> None:
        for entry in prompt:
            self._append("input", entry)
        for entry in output:
            self._append("output", entry)

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: entries.copy() for name, entries in self._fields.items()}
        found["output_token_logprobs_length"] = len(self._fields["output_token_logprobs"])
        return found

    def _append(self, side: str, entry: TokenLogprob) -> None:
        known = entry.logprob is not None  # the first prompt position has nothing before it to be predicted from
        self._fields[f"{side}_token_logprobs"].append(self._triple(entry.logprob, entry.token))
        if self._spec.top:
            top = [self._triple(value, token) for value, token in entry.top] if known else None
            self._fields[f"{side}_top_logprobs"].append(top)
        if self._spec.ids:
            ids = [self._triple(value, token) for value, token in entry.ids] if known else None
            self._fields[f"{side}_token_ids_logprobs"].append(ids)

    def _triple(self, value: float | None, token: int) -> tuple[float | None, int, str | None]:
        return value, token, self._client.token_text(token) if self._with_text else None


def finish_reason(finish: Finish | None) -> dict[str, Any] | None:
    """The native form of a finish."""
    if finish is None:
        return None
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": finish.length}
    status = finish.status or None
    return {"type": "abort", "message": finish.message, "status_code": status, "err_type": None}


async def generate(client: EngineClient, body: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """One whole call in one process: the answer, or a list of them for several sequences."""
    call = await prepare(client, convert(body))
    answers = call.answers(client)
    with client.open(call.messages) as stream:
        while not stream.finished:
            for index, delta in await stream.next():
                _raise_refusal(delta)
                answers[index].add(delta)
    bodies = [answer.body() for answer in answers]
    return bodies if call.batched else bodies[0]


async def generate_stream(client: EngineClient, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """The same as it grows: cumulative unless --incremental-streaming-output; `index` tells sequences apart."""
    call = await prepare(client, convert({**body, "stream": True}))
    answers = call.answers(client)
    with client.open(call.messages) as stream:
        while not stream.finished:
            touched: dict[int, None] = {}
            for index, delta in await stream.next():
                _raise_refusal(delta)
                answers[index].add(delta)
                touched[index] = None
            for index in touched:
                yield chunk(call, answers, index, client.args.incremental_streaming_output)


def chunk(call: Call, answers: list[Answer], index: int, incremental: bool) -> dict[str, Any]:
    """One streamed piece of a native call."""
    found = answers[index].body(incremental=incremental)
    return {**found, "index": index} if call.batched else found


def convert(body: Mapping[str, Any]) -> GenerateBody:
    """A Python caller's object, checked like one that came as JSON."""
    try:
        return msgspec.convert(dict(body), GenerateBody)
    except msgspec.ValidationError as error:
        raise RequestError(f"The request is not valid: {error}.") from None


def _raise_refusal(delta: TextDelta) -> None:
    error = errors.of_finish(delta.finish)
    if error is not None:
        raise error
