"""moonlang.Engine as a user's program holds it. Random weights: what is checked is the machinery, not the words."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import write_tiny_folder

import moonlang
from moonlang.base.errors import ConfigError, RequestError

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
ENDLESS = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
GONE_S = 60.0


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_tiny_folder(tmp_path_factory.mktemp("model"))
    return {"model_path": str(folder), "load_format": "dummy", "max_total_tokens": 20000}


@pytest.fixture(scope="module")
def engine(options: dict[str, Any]) -> Iterator[moonlang.Engine]:
    with moonlang.Engine(**options) as engine:
        yield engine


def text_of(answer: Any) -> str:
    assert isinstance(answer, dict)
    return answer["text"]


def test_one_prompt_gives_a_dict(engine: moonlang.Engine) -> None:
    answer = engine.generate("Hello", GREEDY)
    assert isinstance(answer, dict)
    assert len(answer["output_ids"]) == 8
    meta = answer["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (5, 8)
    assert meta["finish_reason"] == {"type": "length", "length": 8}


def test_several_prompts_give_a_list_in_their_order(engine: moonlang.Engine) -> None:
    prompts = ["Hello", "x", "a longer one"]
    answers = engine.generate(prompts, GREEDY)
    assert isinstance(answers, list)
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [5, 1, 12]
    assert [text_of(answer) for answer in answers] == [text_of(engine.generate(prompt, GREEDY)) for prompt in prompts]


def test_token_ids_in(engine: moonlang.Engine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("Hello")
    assert text_of(engine.generate(input_ids=ids, sampling_params=GREEDY)) == text_of(engine.generate("Hello", GREEDY))
    assert isinstance(engine.generate(input_ids=[ids, ids], sampling_params=GREEDY), list)


def test_logprobs(engine: moonlang.Engine) -> None:
    answer = engine.generate("Hello", GREEDY, return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    assert isinstance(answer, dict)
    meta = answer["meta_info"]
    assert len(meta["input_token_logprobs"]) == 5
    assert meta["input_token_logprobs"][0][0] is None
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(len(entry) == 2 for entry in meta["output_top_logprobs"])


def test_a_stream_is_cumulative_and_ends_with_the_finish(engine: moonlang.Engine) -> None:
    pieces = list(engine.generate("Hello", GREEDY, stream=True))
    whole = engine.generate("Hello", GREEDY)
    assert isinstance(whole, dict)
    assert [len(piece["output_ids"]) for piece in pieces][-1] == 8
    for before, after in pairwise(pieces):
        assert after["text"].startswith(before["text"])
    assert pieces[-1]["text"] == whole["text"]
    assert [piece["meta_info"]["finish_reason"] is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_async_calls_from_the_callers_own_loop(engine: moonlang.Engine) -> None:
    expected = [text_of(engine.generate(f"p{index}", GREEDY)) for index in range(4)]

    async def main() -> tuple[list[str], str]:
        answers = await asyncio.gather(*(engine.async_generate(f"p{index}", GREEDY) for index in range(4)))
        last = ""
        async for piece in await engine.async_generate("p0", GREEDY, stream=True):
            last = piece["text"]
        assert text_of(engine.generate("p1", GREEDY)) == expected[1]  # the synchronous call works in a loop, too
        return [text_of(answer) for answer in answers], last

    assert asyncio.run(main()) == (expected, expected[0])


def test_calls_from_many_threads(engine: moonlang.Engine) -> None:
    expected = text_of(engine.generate("Hello", GREEDY))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: engine.generate("Hello", GREEDY), range(16)))
    assert {text_of(answer) for answer in answers} == {expected}


def test_a_refused_request_is_an_error_and_changes_nothing(engine: moonlang.Engine) -> None:
    with pytest.raises(RequestError, match="temperature"):
        engine.generate("x", {"temperature": -1})
    with pytest.raises(RequestError, match="Exactly one"):
        engine.generate()
    with pytest.raises(RequestError, match="image_data"):
        engine.generate("x", GREEDY, image_data="picture.png")
    for broken in ({"prompt": "\ud800"}, {"prompt": "x", "sampling_params": {"stop": ["\ud800"]}}):
        with pytest.raises(RequestError):
            engine.generate(**broken)
    assert text_of(engine.generate("x", GREEDY))


def test_a_stop_string_cuts_the_same_text_and_frees_the_request(engine: moonlang.Engine) -> None:
    sampling = {"temperature": 1.5, "sampling_seed": 7, "max_new_tokens": 200, "ignore_eos": True}
    text = text_of(engine.generate("Hello", sampling))
    stop = next(text[at : at + 2] for at in range(100, len(text)) if "\ufffd" not in text[at : at + 2])
    expected = text[: text.index(stop)]
    for stream in (False, True):
        answer = engine.generate("Hello", {**sampling, "stop": [stop], "max_new_tokens": 4000}, stream=stream)
        pieces = list(answer) if stream else [answer]
        assert pieces[-1]["text"] == expected
        assert pieces[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert all(expected.startswith(piece["text"]) for piece in pieces)
        assert engine.flush_cache(timeout_s=GONE_S)


def test_a_stream_that_is_left_early_is_aborted(engine: moonlang.Engine) -> None:
    stream = engine.generate("Hello", ENDLESS, stream=True)
    next(iter(stream))
    stream.close()  # type: ignore[union-attr]
    assert engine.flush_cache(timeout_s=GONE_S)  # needs an engine without requests


def test_abort_ends_a_call_with_an_abort(engine: moonlang.Engine) -> None:
    stream = iter(engine.generate("Hello", ENDLESS, stream=True, rid="to-be-aborted"))
    next(stream)
    engine.abort("to-be")
    finish = list(stream)[-1]["meta_info"]["finish_reason"]
    assert finish["type"] == "abort"


def test_flush_cache_forgets_prefixes(engine: moonlang.Engine) -> None:
    prompt = "a prompt of more than one page of sixteen tokens"
    engine.generate(prompt, GREEDY)
    warm = engine.generate(prompt, GREEDY)
    assert isinstance(warm, dict)
    assert warm["meta_info"]["cached_tokens"] > 0
    assert engine.flush_cache()
    cold = engine.generate(prompt, GREEDY)
    assert isinstance(cold, dict)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert cold["text"] == warm["text"]


def test_it_tells_about_itself(engine: moonlang.Engine, options: dict[str, Any]) -> None:
    assert engine.get_server_info()["max_total_num_tokens"] == 20000
    assert engine.get_model_info()["model_path"] == options["model_path"]
    assert len(engine.get_all_child_pids()) == 2


def test_a_second_engine_beside_the_first(engine: moonlang.Engine, options: dict[str, Any]) -> None:
    expected = text_of(engine.generate("Hello", GREEDY))
    with moonlang.Engine(**options, in_process=True) as second:
        assert text_of(second.generate("Hello", GREEDY)) == expected
    assert text_of(engine.generate("Hello", GREEDY)) == expected


def test_without_a_tokenizer_ids_go_in_and_out(options: dict[str, Any]) -> None:
    with moonlang.Engine(**options, in_process=True, skip_tokenizer_init=True) as engine:
        assert engine.tokenizer is None
        answer = engine.generate(input_ids=[1, 2, 3], sampling_params=GREEDY)
        assert isinstance(answer, dict)
        assert (answer["text"], len(answer["output_ids"])) == ("", 8)
        with pytest.raises(RequestError, match="input_ids"):
            engine.generate("text", GREEDY)


def test_after_shutdown_calls_are_refused(options: dict[str, Any]) -> None:
    engine = moonlang.Engine(**options, in_process=True)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(RequestError, match="shut down"):
        engine.generate("x", GREEDY)


def test_shutdown_ends_a_waiting_call(options: dict[str, Any]) -> None:
    engine = moonlang.Engine(**options, in_process=True)
    stream = iter(engine.generate("Hello", ENDLESS, stream=True))
    next(stream)
    threading.Timer(0.05, engine.shutdown).start()
    with pytest.raises(RequestError):
        for _ in stream:
            pass
    engine.shutdown()


def test_wrong_arguments_are_config_errors(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        moonlang.Engine(**options, no_such_argument=1)
    with pytest.raises(ConfigError, match=r"config\.json"):
        moonlang.Engine(model_path=str(tmp_path))


DIES = """
import os, signal, sys, moonlang
engine = moonlang.Engine(model_path=sys.argv[1], load_format="dummy", max_total_tokens=20000)
print(*engine.get_all_child_pids(), flush=True)
stream = iter(engine.generate("x", {"max_new_tokens": 4000, "ignore_eos": True}, stream=True))
next(stream)
os.kill(engine.get_all_child_pids()[0], signal.SIGKILL)
try:
    list(stream)
except moonlang.base.errors.RequestError as error:
    print(error, flush=True)
"""

FORGETS = """
import sys, moonlang
engine = moonlang.Engine(model_path=sys.argv[1], load_format="dummy", max_total_tokens=20000)
print(*engine.get_all_child_pids(), flush=True)
print(engine.generate("x", {"max_new_tokens": 2, "ignore_eos": True})["meta_info"]["completion_tokens"], flush=True)
"""


@pytest.mark.parametrize(
    ("program", "says"), [(DIES, "was killed by SIGKILL"), (FORGETS, "2")], ids=["dies", "forgets"]
)
def test_a_program_without_shutdown_leaves_nothing_behind(options: dict[str, Any], program: str, says: str) -> None:
    root = str(Path(moonlang.__file__).parents[1])
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as temporary:
        done = subprocess.run(
            [sys.executable, "-c", "import moonlang.base.errors\n" + program, options["model_path"]],
            env=os.environ | {"PYTHONPATH": root, "TMPDIR": temporary},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        pids, said = done.stdout.splitlines()
        assert says in said
        for pid in pids.split():
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), signal.SIG_DFL)
        assert list(Path(temporary).iterdir()) == []
