"""From what a user sends to `SamplingParams`: names, types, ranges and defaults are checked here and nowhere else.

Pure: no clock, no random source. A request that names no seed gets the one its caller drew for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from moonlang.base.errors import RequestError
from moonlang.core.sampling import GrammarKind, GrammarSpec, SamplingParams

MAX_SAMPLES = 1024  # of `n`
MAX_STOPS = 32
MAX_STOP_CHARS = 4096
MAX_STOP_REGEX_BYTES = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_GRAMMAR_CHARS = 1 << 18
MAX_GRAMMAR_DEPTH = 64  # of nesting in a JSON schema; the time to compile one grows steeply with it
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ANY_JSON_OBJECT = "$$ANY$$"  # SGLang's spelling of "some JSON object"
SHOWN_CHARS = 64  # of an offending value in an error text

_GRAMMARS: tuple[GrammarKind, ...] = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True, slots=True)
class _Range:
    """A range of finite numbers. `text` completes the sentence "<name> must be ..."."""

    text: str
    low: float
    high: float
    low_open: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.low_open else self.low <= value) and value <= self.high


_FLOATS = {
    "temperature": _Range("a finite number >= 0", 0.0, math.inf),
    "top_p": _Range("a number in (0, 1]", 0.0, 1.0, low_open=True),
    "min_p": _Range("a number in [0, 1]", 0.0, 1.0),
    "frequency_penalty": _Range("a number in [-2, 2]", -2.0, 2.0),
    "presence_penalty": _Range("a number in [-2, 2]", -2.0, 2.0),
    "repetition_penalty": _Range("a number in [1e-6, 2]", 1e-6, 2.0),
}
_INTS = {
    "max_new_tokens": _Range(f"an integer in [0, {INT32_MAX}]", 0, INT32_MAX),
    "min_new_tokens": _Range("an integer in [0, max_new_tokens]", 0, INT32_MAX),
    "top_k": _Range("-1 (the whole vocabulary) or an integer >= 1", -1, INT32_MAX),
    "n": _Range(f"an integer in [1, {MAX_SAMPLES}]", 1, MAX_SAMPLES),
    "sampling_seed": _Range("an integer of 64 bits", INT64_MIN, INT64_MAX),
    "stream_interval": _Range(f"an integer in [1, {INT32_MAX}]", 1, INT32_MAX),
    "beam_width": _Range("an integer >= 1", 1, INT32_MAX),
}
_MOST_BIAS = 1e30  # decides by itself, and a logit remains a finite number of 32 bits, also over a low temperature
_FLAGS = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim")
_OTHERS = ("stop", "stop_token_ids", "stop_regex", "logit_bias", "custom_params", "watermark")

NAMES: tuple[str, ...] = tuple(sorted((*_FLOATS, *_INTS, *_FLAGS, *_GRAMMARS, *_OTHERS)))
_KNOWN = frozenset(NAMES)

DEFAULTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what generation_config.json may fill


def parse_sampling(
    raw: Mapping[str, Any] | None,
    *,
    vocab_size: int,
    fresh_seed: int,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[SamplingParams, int]:
    """Check one user's parameters and return them with n, the number of samples wanted.

    raw: as sent; None and null values mean "default". defaults: of the server or the model, under the same names.
    fresh_seed: used when the request names none. RequestError 400 on anything unknown, mistyped or out of range.
    """
    given = _merge(raw, defaults)
    numbers = _numbers(given)
    n = numbers.pop("n", 1)
    _refuse_unsupported(given, numbers)
    params = SamplingParams(
        seed=numbers.pop("sampling_seed", fresh_seed),
        **numbers,
        **_flags(given),
        stop=_stop_strings(given.get("stop")),
        stop_regex=_stop_regexes(given.get("stop_regex")),
        stop_token_ids=_stop_token_ids(given.get("stop_token_ids")),
        grammar=_grammar(given),
        logit_bias=_logit_bias(given.get("logit_bias"), vocab_size),
    )
    if params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens:
        raise _bad("min_new_tokens", f"in [0, max_new_tokens = {params.max_new_tokens}]", params.min_new_tokens)
    return params, n


def model_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults that a checkpoint's generation_config.json sets (--sampling-defaults model)."""
    found = {name: generation[name] for name in DEFAULTABLE if generation.get(name) is not None}
    if found.get("top_k") == 0:  # Transformers writes 0 for "off"
        del found["top_k"]
    return found


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request: the seed itself for the first, then mixed int64 values (splitmix64)."""
    if index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z - 2**64 if z > INT64_MAX else z


def shown(value: Any) -> str:
    """A user's value in an error text: never long, never slow."""
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN_CHARS:
        return f"an integer of {value.bit_length()} bits"  # repr() of a huge one is slow, and refused past 4,300 digits
    text = repr(value) if not isinstance(value, (list, dict)) else f"a {type(value).__name__} of {len(value)} items"
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def _bad(name: str, rule: str, value: Any) -> RequestError:
    return RequestError(f"{name} must be {rule}, got {shown(value)}.")


def _merge(raw: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise _bad("sampling_params", "an object", raw)
    unknown = [str(key) for key in raw if key not in _KNOWN]
    if unknown:
        names = ", ".join(shown(key) for key in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise RequestError(f"Unknown sampling parameters: {names}. Allowed: {', '.join(NAMES)}.")
    given = {key: value for key, value in (defaults or {}).items() if value is not None}
    given.update((key, value) for key, value in raw.items() if value is not None)
    if raw and "max_new_tokens" in raw and raw["max_new_tokens"] is None:
        given["max_new_tokens"] = None  # the one null with a meaning of its own: until the context ends
    return given


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, rule in _FLOATS.items():
        if name in given:
            found[name] = _float(name, rule, given[name])
    for name, rule in _INTS.items():
        if name in given:
            value = given[name]
            found[name] = value if name == "max_new_tokens" and value is None else _int(name, rule, value)
    if "top_k" in found:
        if found["top_k"] == 0:
            raise _bad("top_k", _INTS["top_k"].text, 0)
        found["top_k"] = max(found["top_k"], 0)  # 0 is the engine's word for the whole vocabulary
    return found


def _float(name: str, rule: _Range, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _bad(name, rule.text, value)
    if (isinstance(value, int) and value.bit_length() > 64) or not math.isfinite(value) or not rule.holds(value):
        raise _bad(name, rule.text, value)
    return float(value)


def _int(name: str, rule: _Range, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not rule.holds(value):
        raise _bad(name, rule.text, value)
    return value


def _flags(given: Mapping[str, Any]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for name in _FLAGS:
        if name in given:
            if not isinstance(given[name], bool):
                raise _bad(name, "true or false", given[name])
            found[name] = given[name]
    return found


def _refuse_unsupported(given: Mapping[str, Any], numbers: dict[str, Any]) -> None:
    if numbers.pop("beam_width", 1) != 1:
        raise RequestError(f"beam_width must be 1: beam search is not supported, got {shown(given['beam_width'])}.")
    if given.get("watermark"):
        raise RequestError("watermark must be null: watermarking is not supported.")
    custom = given.get("custom_params")  # read by logit processors only, which are refused where they are named
    if custom is not None and not isinstance(custom, Mapping):
        raise _bad("custom_params", "an object", custom)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """One string or a list of them; empty ones count as not given."""
    items = [value] if isinstance(value, str) else value
    if items is None:
        return ()
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise _bad(name, "a string or a list of strings", value)
    if len(items) > MAX_STOPS:
        raise _bad(name, f"at most {MAX_STOPS} strings", value)
    return tuple(item for item in items if item)


def _stop_strings(value: Any) -> tuple[str, ...]:
    items = _strings("stop", value)
    for item in items:
        if len(item) > MAX_STOP_CHARS:
            raise _bad("stop", f"strings of at most {MAX_STOP_CHARS} characters", item)
    return items


def _stop_regexes(value: Any) -> tuple[str, ...]:
    items = _strings("stop_regex", value)
    for item in items:
        if len(item.encode()) > MAX_STOP_REGEX_BYTES:
            raise _bad("stop_regex", f"expressions of at most {MAX_STOP_REGEX_BYTES} bytes", item)
        try:
            re.compile(item)
        except (re.error, OverflowError, RecursionError) as error:
            raise RequestError(f"stop_regex must be valid regular expressions ({error}), got {shown(item)}.") from None
    return items


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    rule = f"a list of at most {MAX_STOP_TOKEN_IDS} token ids"
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or len(value) > MAX_STOP_TOKEN_IDS:
        raise _bad("stop_token_ids", rule, value)
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= INT32_MAX:
            raise _bad("stop_token_ids", rule, item)
    return tuple(value)


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _bad("logit_bias", "an object of token id to number", value)
    found: dict[int, float] = {}
    for key, bias in value.items():
        token = key if isinstance(key, int) and not isinstance(key, bool) else _token_id(key)
        if token is None or not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias must be keyed by token ids in [0, {vocab_size - 1}], got {shown(key)}.")
        number = _float(f"logit_bias[{token}]", _Range("a finite number", -math.inf, math.inf), bias)
        found[token] = max(-_MOST_BIAS, min(_MOST_BIAS, number))
    return found


def _token_id(key: Any) -> int | None:
    text = str(key)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None


def _grammar(given: Mapping[str, Any]) -> GrammarSpec | None:
    chosen: list[GrammarKind] = [kind for kind in _GRAMMARS if given.get(kind) not in (None, "")]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise RequestError(f"Only one of {', '.join(_GRAMMARS)} can be set, got {', '.join(chosen)}.")
    kind = chosen[0]
    value = given[kind]
    if kind in ("regex", "ebnf"):
        if not isinstance(value, str):
            raise _bad(kind, "a string", value)
        source = value
    else:
        source = _json_text(kind, value)
    if len(source) > MAX_GRAMMAR_CHARS:
        raise _bad(kind, f"at most {MAX_GRAMMAR_CHARS} characters long", source)
    return GrammarSpec(kind, source)


def _json_text(kind: str, value: Any) -> str:
    """A schema as text, whether it came as text or as an object; equal schemas sent either way give equal text."""
    if kind == "json_schema" and value == ANY_JSON_OBJECT:
        return '{"type":"object"}'
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise RequestError(f"{kind} must be valid JSON ({error}), got {shown(value)}.") from None
    if not isinstance(value, (Mapping, bool)):
        raise _bad(kind, "a JSON object", value)
    _check_depth(kind, value)
    return msgspec.json.encode(value).decode()


def _check_depth(kind: str, value: Any) -> None:
    """Refuse what is nested too deeply, level by level: recursion is what it must be kept from."""
    level = [value]
    for _ in range(MAX_GRAMMAR_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (Mapping, list))
            for child in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return
    raise _bad(kind, f"nested at most {MAX_GRAMMAR_DEPTH} levels deep", value)
