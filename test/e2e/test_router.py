"""The router in front of real servers that work alone."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import LiveProcess, LiveServer

QUICK = ("--health-check-interval-secs", "0.2", "--health-check-timeout-secs", "2")
BODY = {"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}}
LONG = {"text": "Once", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}, "stream": True}


class LiveRouter(LiveProcess):
    """A router in front of these servers, `python -m moonlang.router`."""

    def __init__(self, folder: Path, *servers: LiveServer, flags: tuple[str, ...] = ()) -> None:
        urls = ["--worker-urls", *(server.url for server in servers)]
        super().__init__(folder, "moonlang.router", "--host", "127.0.0.1", *urls, *QUICK, *flags)

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["url"]: worker for worker in self.http.get("/workers").json()["workers"]}

    def all_up(self) -> bool:
        return all(worker["is_healthy"] for worker in self.workers().values())

    def events(self, body: dict[str, Any]) -> list[Any]:
        with self.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
            assert response.status_code == 200
            *lines, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert last == "[DONE]"
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("other"), "--max-total-tokens", "20000") as running:
        yield running


@pytest.fixture(scope="module")
def router(server: LiveServer, other: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRouter]:
    folder = tmp_path_factory.mktemp("router")
    with LiveRouter(folder, server, other, flags=("--policy", "round_robin")) as running:
        running.until(running.all_up)
        yield running


def test_answers_are_those_of_the_server(server: LiveServer, router: LiveRouter) -> None:
    straight = server.http.post("/generate", json=BODY).json()
    for _ in range(2):  # once by each server
        assert router.http.post("/generate", json=BODY).json()["output_ids"] == straight["output_ids"]
    assert router.events(BODY)[-1]["output_ids"] == straight["output_ids"]
    batch = router.http.post("/generate", json={**BODY, "text": ["Once upon a time", "The"]}).json()
    assert batch[0]["output_ids"] == straight["output_ids"]
    wrong = router.http.post("/generate", json={**BODY, "sampling_params": {"temperature": -1}})
    assert wrong.status_code == 400
    assert wrong.json() == server.http.post("/generate", json={**BODY, "sampling_params": {"temperature": -1}}).json()


def test_the_openai_client_works_through_it(router: LiveRouter) -> None:
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": "What is 7 + 5?"}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
    chunks = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    completion = client.completions.create(model=model, prompt=["The", "A"], temperature=0, max_tokens=4)
    assert len(completion.choices) == 2
    client.close()


def test_both_servers_work(server: LiveServer, other: LiveServer, router: LiveRouter) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: router.http.post("/generate", json=BODY).status_code, range(16)))
    assert set(answers) == {200}
    text = router.http.get("/metrics").text
    for one in (server, other):
        line = next(line for line in text.splitlines() if line.startswith("smg_worker_selection") and one.url in line)
        assert float(line.rpartition(" ")[2]) > 0
    info = router.http.get("/server_info").json()
    assert [worker["tp_size"] for worker in info["regular"]] == [1, 1]
    assert len(info["internal_states"]) == 2


def test_a_client_that_leaves_frees_the_server(server: LiveServer, other: LiveServer, router: LiveRouter) -> None:
    for _ in range(2):
        with router.http.stream("POST", "/generate", json=LONG) as response:
            next(response.iter_lines())
    for one in (server, other):
        one.wait_idle()


def test_a_server_leaves_and_another_comes(tmp_path: Path, server: LiveServer, other: LiveServer) -> None:
    with LiveRouter(tmp_path, server) as router:
        begun, ended = threading.Event(), []

        def read() -> None:
            body = {**LONG, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
            with router.http.stream("POST", "/generate", json=body) as response:
                for line in response.iter_lines():
                    begun.set()
                    ended.append(line)

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(120)
        assert router.http.post("/workers", json={"url": other.url}).status_code == 202
        assert router.http.delete(f"/workers/{server.url}").status_code == 202
        router.until(lambda: router.workers()[other.url]["is_healthy"])
        assert router.http.post("/generate", json=BODY).status_code == 200
        reader.join(120)
        assert [line for line in ended if line][-1] == "data: [DONE]"
        assert json.loads([line for line in ended if line][-2][6:])["meta_info"]["completion_tokens"] == 300
        router.until(lambda: len(router.workers()) == 1)
        assert router.stop() == 0


def test_a_wrong_command_line_is_explained(tmp_path: Path) -> None:
    router = LiveProcess(tmp_path, "sglang.srt.disaggregation.mini_lb", "--prefil", "http://a:1")
    try:
        assert router.process.wait(120) == 2
        assert router.log == "Error: There is no flag --prefil. Closest: --prefill, --prefill-policy.\n"
    finally:
        router.close()


def test_a_killed_server_costs_no_request(tmp_path: Path, server: LiveServer, other: LiveServer) -> None:
    """Last in this file: the other server is not there any more after it."""
    with LiveRouter(tmp_path, other, server, flags=("--policy", "round_robin")) as router:
        router.until(router.all_up)
        one = {**BODY, "sampling_params": {**BODY["sampling_params"], "max_new_tokens": 400}}
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(router.http.post, "/generate", json={**one, "text": f"{n} times"}) for n in range(8)]
            router.until(lambda: router.workers()[other.url]["load"] or all(one.done() for one in asked))
            other.process.send_signal(signal.SIGKILL)
            answers = [answer.result(150) for answer in asked]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert all(answer.json()["meta_info"]["completion_tokens"] == 400 for answer in answers)
        assert router.http.post("/generate", json=BODY).status_code == 200
        router.until(lambda: not router.workers()[other.url]["is_healthy"])
