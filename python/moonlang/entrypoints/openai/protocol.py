"""Requests of the OpenAI dialect. Unknown fields are ignored and null means "not given", as clients and routers expect.

Sampling fields are typed `Any` here: `core.sampling_parse` checks them, with one wording for every way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from moonlang.base.errors import RequestError
from moonlang.core.sampling_parse import ANY_JSON_OBJECT
from moonlang.entrypoints.pairing import PairFields

_SAME_NAME = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n"),
    *("stop", "stop_token_ids", "stop_regex", "no_stop_trim", "ignore_eos", "skip_special_tokens", "logit_bias"),
    *("regex", "ebnf", "json_schema", "custom_params", "watermark"),
)
_RENAMED = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}

REFUSED = ("lora_path", "session_params", "return_hidden_states", "return_routed_experts", "return_sampling_mask")


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Request(PairFields, kw_only=True):
    """The fields that chat and text completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: str | None = None
    priority: int | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    n: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    stop_regex: Any = None
    no_stop_trim: Any = None
    ignore_eos: Any = None
    skip_special_tokens: Any = None
    min_tokens: Any = None
    logit_bias: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None
    custom_params: Any = None
    watermark: Any = None
    # What this version cannot do is refused, not overlooked.
    custom_logit_processor: Any = None
    lora_path: Any = None
    session_params: Any = None
    return_hidden_states: Any = None
    return_routed_experts: Any = None
    return_sampling_mask: Any = None


class ChatRequest(_Request, kw_only=True):
    """POST /v1/chat/completions. input_ids replaces the rendered messages."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    input_ids: list[Any] | None = None
    return_meta_info: bool | None = None


class CompletionRequest(_Request, kw_only=True):
    """POST /v1/completions. prompt: a text, a list of them, token ids, or a list of lists of token ids."""

    prompt: str | list[Any]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /v1/tokenize: a prompt, or messages to render first."""

    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /v1/detokenize."""

    tokens: list[Any]
    skip_special_tokens: bool = True


def native_sampling(body: ChatRequest | CompletionRequest, max_new_tokens: int | None) -> dict[str, Any]:
    """The sampling parameters of a request under their native names."""
    found: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    for name in _SAME_NAME:
        value = getattr(body, name)
        if value is not None:
            found[name] = value
    for name, native in _RENAMED.items():
        value = getattr(body, name)
        if value is not None:
            found[native] = value
    if body.response_format is not None:
        found.update(_grammar(body.response_format))
    return found


def _grammar(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`response_format` as the native grammar parameter."""
    kind = wanted.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": ANY_JSON_OBJECT}
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, (Mapping, bool)):
            raise RequestError('response_format of type "json_schema" needs json_schema.schema, a JSON schema object.')
        return {"json_schema": schema}
    if kind == "structural_tag":
        return {"structural_tag": dict(wanted)}
    for name in ("regex", "ebnf"):
        if kind == name:
            return {name: wanted.get(name) or wanted.get("pattern") or wanted.get("grammar")}
    kinds = "text, json_object, json_schema, structural_tag, regex, ebnf"
    raise RequestError(f"response_format.type must be one of {kinds}, got {str(kind)[:64]!r}.")
