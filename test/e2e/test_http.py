"""/generate on a real server: real model, real sockets."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import pytest
from live_server import LiveServer

from moonlang.roles.surveys import LOOKS

PROMPT = "Once upon a time"
LONG = {"max_new_tokens": 3000, "ignore_eos": True, "temperature": 0}


def generate(server: LiveServer, **body: Any) -> Any:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def greedy(tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more}


def stream(server: LiveServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        *lines, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


def test_it_listens_and_says_so(server: LiveServer) -> None:
    assert "The server is fired up and ready to roll!" in server.log
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/health_generate").status_code == 200


def test_text_and_ids_give_the_same(server: LiveServer) -> None:
    text = generate(server, text=PROMPT, sampling_params=greedy())
    ids = server.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert generate(server, input_ids=ids, sampling_params=greedy())["output_ids"] == text["output_ids"]
    assert len(text["output_ids"]) == 8
    assert text["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert text["meta_info"]["prompt_tokens"] == len(ids)


def test_a_batch_gives_what_each_prompt_gives_alone(server: LiveServer) -> None:
    prompts = [PROMPT, "The", "A little dog", "7 + 5 ="]
    alone = [generate(server, text=prompt, sampling_params=greedy())["text"] for prompt in prompts]
    together = generate(server, text=prompts, sampling_params=greedy())
    assert [answer["text"] for answer in together] == alone


def test_a_stream_ends_with_the_whole_answer(server: LiveServer) -> None:
    whole = generate(server, text=PROMPT, sampling_params=greedy(20))
    chunks = stream(server, {"text": PROMPT, "sampling_params": greedy(20)})
    assert len(chunks) > 2
    assert chunks[-1]["text"] == whole["text"]
    assert chunks[-1]["output_ids"] == whole["output_ids"]
    assert [len(chunk["output_ids"]) for chunk in chunks] == sorted(len(chunk["output_ids"]) for chunk in chunks)


def test_a_second_run_finds_its_prompt_in_the_cache(server: LiveServer) -> None:
    prompt = "The cache remembers this sentence, word by word, since it has been here before. " * 4
    body = {"text": prompt, "sampling_params": greedy(4)}
    first = generate(server, **body)
    second = generate(server, **body)
    salted = generate(server, **body, cache_salt="mine")
    assert first["output_ids"] == second["output_ids"] == salted["output_ids"]
    assert second["meta_info"]["cached_tokens"] > 0
    assert salted["meta_info"]["cached_tokens"] == 0


def test_seeds_repeat_whatever_else_runs(server: LiveServer) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 77, "n": 3}
    alone = [answer["output_ids"] for answer in generate(server, text=PROMPT, sampling_params=params)]
    assert len({tuple(ids) for ids in alone}) > 1  # samples of one seed differ
    batch = [params, {**params, "sampling_seed": 78}]
    mixed = generate(server, text=[PROMPT, PROMPT], sampling_params=batch)
    assert [answer["output_ids"] for answer in mixed[:3]] == alone
    assert [answer["output_ids"] for answer in mixed[3:]] != alone


def test_logprobs_of_input_and_output(server: LiveServer) -> None:
    answer = generate(
        server,
        text=PROMPT,
        sampling_params=greedy(3),
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[5, 6],
        return_text_in_logprobs=True,
    )
    meta = answer["meta_info"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert meta["input_token_logprobs"][0][0] is None
    assert meta["input_top_logprobs"][0] is None
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert "".join(entry[2] for entry in meta["output_token_logprobs"]) == answer["text"]
    for entry, top, ids in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], meta["output_token_ids_logprobs"], strict=True
    ):
        assert top[0][:2] == entry[:2]  # greedy takes the best
        assert top[0][0] >= top[1][0]
        assert [chosen[1] for chosen in ids] == [5, 6]


def test_stop_strings_are_cut_off_unless_wanted(server: LiveServer) -> None:
    whole = generate(server, text=PROMPT, sampling_params=greedy(24))["text"]
    stop = whole.split()[2]
    answer = generate(server, text=PROMPT, sampling_params=greedy(24, stop=stop))
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = generate(server, text=PROMPT, sampling_params=greedy(24, stop=[stop], no_stop_trim=True))
    assert kept["text"] == whole[: whole.index(stop) + len(stop)]
    (last,) = stream(server, {"text": PROMPT, "sampling_params": greedy(24, stop=stop)})[-1:]
    assert last["text"] == answer["text"]


def test_stop_tokens_and_regexes(server: LiveServer) -> None:
    whole = generate(server, text=PROMPT, sampling_params=greedy(16))
    token = whole["output_ids"][4]
    answer = generate(server, text=PROMPT, sampling_params=greedy(16, stop_token_ids=[token]))
    first = whole["output_ids"].index(token)
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert len(answer["output_ids"]) == first + 1
    answer = generate(server, text=PROMPT, sampling_params=greedy(16, stop_regex=r"[a-z]+ed\b|\w{4}"))
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_bias_and_penalties_change_the_answer(server: LiveServer) -> None:
    plain = generate(server, text=PROMPT, sampling_params=greedy(4))
    token = plain["output_ids"][0]
    biased = generate(server, text=PROMPT, sampling_params=greedy(4, logit_bias={str(token): -100}))
    assert biased["output_ids"][0] != token
    forced = generate(server, text=PROMPT, sampling_params=greedy(4, logit_bias={"40": 100}))
    assert forced["output_ids"] == [40] * 4
    punished = greedy(32, logit_bias={"40": 100, "41": 99}, frequency_penalty=2.0)
    assert set(generate(server, text=PROMPT, sampling_params=punished)["output_ids"]) == {40, 41}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_grammars(server: LiveServer) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 200, "sampling_seed": 3}
    answer = generate(server, text="Tell me:", sampling_params={**params, "json_schema": json.dumps(SCHEMA)})
    found = json.loads(answer["text"])
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)
    answer = generate(server, text="Tell me:", sampling_params={**params, "regex": "(yes|no)!"})
    assert answer["text"] in ("yes!", "no!")
    answer = generate(server, text="Tell me:", sampling_params={**params, "ebnf": 'root ::= "a" | "b"'})
    assert answer["text"] in ("a", "b")


@pytest.mark.parametrize("params", [{"json_schema": '{"type": "nonsense"}'}, {"regex": "("}, {"ebnf": "root := what"}])
def test_a_broken_grammar_is_a_400(server: LiveServer, params: dict[str, Any]) -> None:
    response = server.http.post("/generate", json={"text": "a", "sampling_params": params})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_prompts_beyond_the_context_are_refused(server: LiveServer) -> None:
    longest = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
    response = server.http.post("/generate", json={"input_ids": [5] * longest})
    message = f"The input ({longest} tokens) is longer than the model's context length ({longest} tokens)."
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)
    body = {"input_ids": [5] * 10, "sampling_params": {"max_new_tokens": longest}}
    response = server.http.post("/generate", json=body)
    assert response.status_code == 400
    assert "Requested token count exceeds the model's maximum context length" in response.json()["error"]["message"]


def hang_up_after_first_bytes(server: LiveServer, body: dict[str, Any]) -> None:
    """Send a request by hand, and close the socket as soon as it runs, and something has been read of a stream."""
    server.wait_idle()
    running = len(body["text"]) if isinstance(body["text"], list) else 1
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(head + content)
        server.until(lambda: server.load()["num_running"] == running)
        found = b""
        while body["stream"] and b"data:" not in found:
            found += connection.recv(4096)


def test_a_client_that_hangs_up_frees_its_pages(server: LiveServer) -> None:
    aborted = server.wait_idle()["total_aborted"]
    hang_up_after_first_bytes(server, {"text": PROMPT, "sampling_params": LONG, "stream": True})
    hang_up_after_first_bytes(server, {"text": [PROMPT, "And"], "sampling_params": LONG, "stream": False})
    assert server.wait_idle()["total_aborted"] == aborted + 3


def test_abort_by_prefix(server: LiveServer) -> None:
    found: list[dict[str, Any]] = []

    def ask(rid: str, params: dict[str, Any]) -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            body = {"text": PROMPT, "sampling_params": params, "rid": rid, "stream": True}
            with http.stream("POST", "/generate", json=body) as response:
                lines = [line for line in response.iter_lines() if line.startswith("data: {")]
            found.append(json.loads(lines[-1].removeprefix("data: ")))

    threads = [threading.Thread(target=ask, args=(f"job_{i}", LONG)) for i in range(2)]
    for thread in threads:
        thread.start()
    server.until(lambda: server.load()["num_running"] == 2)
    duplicate = server.http.post("/generate", json={"text": "a", "rid": "job_0"})
    assert (duplicate.status_code, "already in use" in duplicate.text) == (400, True)
    assert server.http.post("/abort_request", json={"rid": "job_"}).status_code == 200
    for thread in threads:
        thread.join(120)
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in found] == ["abort", "abort"]
    server.wait_idle()


def test_flush_cache_needs_an_idle_server(server: LiveServer) -> None:
    server.wait_idle()
    generate(server, text=PROMPT, sampling_params=greedy(2))
    assert server.http.post("/flush_cache", params={"timeout": 60}).status_code == 200
    load = server.load()
    assert load["cached_tokens"] == 0
    assert load["free_tokens"] == load["max_total_tokens"]


def test_metrics_add_up(server: LiveServer) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sglang:{name}{{"))

    before = {name: value(name) for name in ("generation_tokens_total", "num_requests_total")}
    stream(server, {"text": PROMPT, "sampling_params": greedy(6)})
    assert value("generation_tokens_total") == before["generation_tokens_total"] + 6
    assert value("num_requests_total") == before["num_requests_total"] + 1
    assert value("max_total_num_tokens") == 40000
    assert value("num_running_reqs") == 0


def test_info(server: LiveServer) -> None:
    info = server.http.get("/server_info").json()
    assert info["port"] == server.port
    assert info["max_total_num_tokens"] == 40000
    assert info["internal_states"][0]["memory_usage"]["token_capacity"] == 40000
    assert server.http.get("/v1/loads").json()["loads"][0]["num_running_reqs"] == 0


def test_the_tree_of_an_idle_server_takes_several_steps(server: LiveServer) -> None:
    params = {"max_new_tokens": 1, "temperature": 0}
    prompts = [[first, *range(500, 520)] for first in range(10, 710)]  # a page each
    server.http.post("/generate", json={"input_ids": prompts, "sampling_params": params})
    server.wait_idle()
    found = server.http.get("/ui/tree?nodes=10000").json()
    assert found["num_nodes"] >= len(prompts) > LOOKS // 2  # each is looked at, and then taken
    assert len(found["parent"]) > len(prompts)
    assert sum(weight for parent, weight in zip(found["parent"], found["weight"], strict=True) if parent < 0) > 0
