"""Every sampling parameter: its default, its range, and a clear 400 for everything else."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from moonlang.base.errors import RequestError
from moonlang.core.sampling import GrammarSpec, SamplingParams
from moonlang.core.sampling_parse import INT64_MAX, INT64_MIN, NAMES, derive_seed, model_defaults, parse_sampling

HUGE = 10**400


def parse(raw: Any = None, **more: Any) -> tuple[SamplingParams, int]:
    return parse_sampling(raw, vocab_size=100, fresh_seed=7, **more)


def test_nothing_given_means_the_documented_defaults() -> None:
    params, n = parse()
    assert (params, n) == (SamplingParams(seed=7), 1)
    assert params.max_new_tokens == 128


def test_null_means_default_but_for_max_new_tokens() -> None:
    params, n = parse(dict.fromkeys(NAMES))
    assert (params, n) == (SamplingParams(seed=7, max_new_tokens=None), 1)


@pytest.mark.parametrize(
    ("raw", "field", "value"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens", 0),
        ({"max_new_tokens": 5, "min_new_tokens": 5}, "min_new_tokens", 5),
        ({"max_new_tokens": None, "min_new_tokens": 500}, "min_new_tokens", 500),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 100}, "temperature", 100.0),
        ({"top_p": 1}, "top_p", 1.0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 1}, "top_k", 1),
        ({"min_p": 1}, "min_p", 1.0),
        ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
        ({"presence_penalty": 2}, "presence_penalty", 2.0),
        ({"repetition_penalty": 2}, "repetition_penalty", 2.0),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": ["x", "", "y"]}, "stop", ("x", "y")),
        ({"stop": ""}, "stop", ()),
        ({"stop": ["s"] * 32}, "stop", ("s",) * 32),
        ({"stop_token_ids": [3, 99]}, "stop_token_ids", (3, 99)),
        ({"stop_regex": "a+"}, "stop_regex", ("a+",)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"skip_special_tokens": False}, "skip_special_tokens", False),
        ({"no_stop_trim": True}, "no_stop_trim", True),
        ({"logit_bias": {"5": -100, 6: 1.5}}, "logit_bias", {5: -100.0, 6: 1.5}),
        ({"logit_bias": {"5": 1e308, 6: -1e39}}, "logit_bias", {5: 1e30, 6: -1e30}),
        ({"sampling_seed": INT64_MAX}, "seed", INT64_MAX),
        ({"sampling_seed": INT64_MIN}, "seed", INT64_MIN),
        ({"stream_interval": 4}, "stream_interval", 4),
        ({"regex": "[ab]+", "ebnf": "", "json_schema": ""}, "grammar", GrammarSpec("regex", "[ab]+")),
        ({"ebnf": 'root ::= "a"'}, "grammar", GrammarSpec("ebnf", 'root ::= "a"')),
        ({"json_schema": "$$ANY$$"}, "grammar", GrammarSpec("json_schema", '{"type":"object"}')),
        ({"json_schema": ' {"type": "array"}'}, "grammar", GrammarSpec("json_schema", '{"type":"array"}')),
        ({"json_schema": {"type": "array"}}, "grammar", GrammarSpec("json_schema", '{"type":"array"}')),
        ({"beam_width": 1, "custom_params": {"a": 1}, "watermark": {}}, "grammar", None),
    ],
)
def test_legal_values(raw: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(parse(raw)[0], field) == value


NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "n", "sampling_seed", "stream_interval", "beam_width")


@pytest.mark.parametrize("name", NUMBERS + WHOLE)
@pytest.mark.parametrize("value", [True, "1", [], {}, math.nan, math.inf, -math.inf, HUGE, -HUGE, 1e300 + 0j])
def test_a_number_must_be_a_sane_number(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be .*, got ") as caught:
        parse({name: value})
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer in [0, 2147483647], got -1."),
        ({"max_new_tokens": 1.0}, "got 1.0."),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens must be in [0, max_new_tokens = 4], got 5."),
        ({"min_new_tokens": 129}, "max_new_tokens = 128"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1."),
        ({"top_p": 0}, "top_p must be a number in (0, 1], got 0."),
        ({"top_p": 1.01}, "top_p must be"),
        ({"top_k": 0}, "top_k must be -1 (the whole vocabulary) or an integer >= 1, got 0."),
        ({"top_k": -2}, "top_k must be"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"frequency_penalty": 2.1}, "frequency_penalty must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number in [1e-6, 2], got 0."),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must be"),
        ({"n": 0}, "n must be"),
        ({"n": 10**6}, "n must be"),
        ({"stop": 5}, "stop must be a string or a list of strings, got 5."),
        ({"stop": ["a", 1]}, "stop must be"),
        ({"stop": ["s"] * 33}, "stop must be at most 32 strings"),
        ({"stop": "x" * 5000}, "stop must be strings of at most"),
        ({"stop_regex": "("}, "stop_regex must be valid"),
        ({"stop_regex": "a" * 257}, "stop_regex must be expressions of at most 256 bytes"),
        ({"stop_token_ids": 5}, "stop_token_ids must be"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids must be"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1."),
        ({"no_stop_trim": "yes"}, "no_stop_trim must be"),
        ({"logit_bias": [1]}, "logit_bias must be"),
        ({"logit_bias": {"100": 1}}, "logit_bias must be keyed by token ids in [0, 99], got '100'."),
        ({"logit_bias": {"-1": 1}}, "logit_bias must be keyed"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias must be keyed"),
        ({"logit_bias": {"5": "x"}}, "logit_bias[5] must be a finite number, got 'x'."),
        ({"regex": "a", "json_schema": "{}"}, "Only one of"),
        ({"regex": 5}, "regex must be a string, got 5."),
        ({"json_schema": "{"}, "json_schema must be valid JSON"),
        ({"json_schema": "[1]"}, "json_schema must be a JSON object"),
        ({"json_schema": "[" * 100_000}, "json_schema must be valid JSON"),
        ({"json_schema": '{"a":' * 70 + "1" + "}" * 70}, "json_schema must be nested at most 64 levels deep"),
        ({"structural_tag": {"a": [[[1]]] * 100_000}}, "structural_tag must be at most 262144 characters long"),
        ({"regex": "a" * 300_000}, "regex must be at most 262144 characters long"),
        ({"beam_width": 2}, "beam search is not supported, got 2."),
        ({"watermark": {"a": 1}}, "watermarking is not supported"),
        ({"custom_params": []}, "custom_params must be an object"),
        ({"temprature": 1}, "Unknown sampling parameters: 'temprature'. Allowed: "),
        ({str(i): 1 for i in range(1000)}, "..."),
        ([1], "sampling_params must be an object"),
        ("x", "sampling_params must be an object"),
    ],
)
def test_bad_values_are_named(raw: Any, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(raw)
    assert text in caught.value.message
    assert caught.value.status == 400
    assert len(caught.value.message) < 1000


def test_defaults_of_the_model_stand_under_the_request() -> None:
    defaults = model_defaults({"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "eos_token_id": 2})
    assert defaults == {"temperature": 0.6, "top_k": 20}
    assert parse({"top_k": 5, "temperature": None}, defaults=defaults)[0] == SamplingParams(
        seed=7, temperature=0.6, top_k=5
    )
    assert model_defaults({"top_k": 0}) == {}


def test_what_is_parsed_survives_the_wire() -> None:
    params, _ = parse({"logit_bias": {"5": 1}, "stop": ["a"], "regex": "a", "sampling_seed": INT64_MIN})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_derived_seeds_differ_and_fit() -> None:
    seeds = [derive_seed(base, i) for base in (0, 1, INT64_MIN, INT64_MAX) for i in range(100)]
    assert derive_seed(42, 0) == 42
    assert len(set(seeds)) == len(seeds)
    assert all(INT64_MIN <= seed <= INT64_MAX for seed in seeds)
