"""What servers of several ranks are asked, to be compared with one of one rank."""

from __future__ import annotations

from typing import Any

from live_server import LiveServer

STORY = "The old man and the sea. Once upon a time there was a fisherman who had caught nothing for many days. "
FLAGS = ("--max-total-tokens", "20000", "--random-seed", "1", "--constrained-json-disable-any-whitespace")
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}


def sampled(text: str | list[str], **params: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 24, **params}, **LOGPROBS}


BODIES = {
    "greedy": sampled(STORY * 3, temperature=0),
    "seeded": sampled([STORY, "Hi"], temperature=1.0, sampling_seed=7, top_p=0.9, ignore_eos=True),
    "plain": {"text": ["The", STORY * 9], "sampling_params": {"temperature": 0, "max_new_tokens": 24}},
    "penalties": sampled(STORY, temperature=0, frequency_penalty=0.6, presence_penalty=0.3),
    "grammar": sampled("A number: ", temperature=0, regex="[0-9]{3}-[a-f]{2}"),
}


def answers(server: LiveServer, body: dict[str, Any]) -> list[tuple[Any, ...]]:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    return [
        (one["output_ids"], one["meta_info"].get("output_token_logprobs"), one["meta_info"].get("input_top_logprobs"))
        for one in (found if isinstance(found, list) else [found])
    ]
