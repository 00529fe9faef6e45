"""The page at /ui and its data: what is open, what wants a key, what other hosts' pages may not have."""

from __future__ import annotations

import asyncio
import re

import pytest
from fake_app import Served, run_served

from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Control
from moonlang.entrypoints.ui.site import FOLDER

KEY = {"authorization": "Bearer key"}
ADMIN = {"authorization": "Bearer admin"}
FILES = sorted(file.name for file in FOLDER.iterdir() if file.name != "index.html")


def test_the_page_and_its_files_are_served_without_a_key() -> None:
    async def case(it: Served) -> None:
        for path in ("/ui", *(f"/ui/{name}" for name in FILES)):
            response = await it.http.get(path)
            assert response.status_code == 200
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            again = await it.http.get(path, headers={"if-none-match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert (await it.http.get("/ui/nothing.js", headers=KEY)).status_code == 404

    run_served(case, ServerArgs(api_key="key"))


def test_the_files_name_no_other_host_and_only_files_there_are() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text()
        assert not re.findall(r"(?:src|href|url|from|import)\W{1,3}(?:https?:)?//", text), file.name
        assert not re.search(r"\son\w+=|\sstyle=", text) or file.suffix != ".html", "the policy forbids inline code"
        names = re.findall(r'from "\./([^"]+)"|(?:src|href)="(?:ui/)([^"]+)"', text)
        assert {one or other for one, other in names} <= set(FILES), file.name
        assert len(text.splitlines()) <= 400, f"{file.name} is more than one reads in a sitting"


def test_data_wants_a_key_and_the_tree_the_admin_key() -> None:
    async def case(it: Served) -> None:
        async def statuses(path: str) -> list[int]:
            return [(await it.http.get(path, headers=headers)).status_code for headers in ({}, KEY, ADMIN)]

        assert await statuses("/ui/state") == [401, 200, 200]
        assert await statuses("/ui/tree") == [401, 401, 200]

    run_served(case, ServerArgs(api_key="key", admin_api_key="admin"))


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}],
)
def test_pages_of_other_hosts_get_no_data(headers: dict[str, str]) -> None:
    async def case(it: Served) -> None:
        for path in ("/ui/state", "/ui/tree"):
            assert (await it.http.get(path, headers=headers)).status_code == 403
        assert (await it.http.get("/ui/state", headers={"origin": "http://test"})).status_code == 200

    run_served(case)


@pytest.mark.parametrize("metrics", [False, True])
def test_the_state_counts_latencies_from_the_first_look_on(metrics: bool) -> None:
    async def case(it: Served) -> None:
        body = {"text": "abc", "stream": True}
        await it.http.post("/generate", json=body)
        first = (await it.http.get("/ui/state")).json()
        assert (first["kind"], first["model"], len(first["instances"])) == ("server", "/models/fake", 1)
        assert first["instances"][0]["load"]["num_running"] == 2
        assert sum(first["instances"][0]["figures"]["ttft_s"]["counts"]) == 0
        await it.http.post("/generate", json=body)
        figures = (await it.http.get("/ui/state")).json()["instances"][0]["figures"]
        counts = {name: sum(found["counts"]) for name, found in figures.items()}
        assert counts == {"ttft_s": 1, "itl_s": 2, "queue_s": 1, "e2e_s": 1}
        assert len(figures["ttft_s"]["counts"]) == len(first["bounds"]["seconds"]) + 1

    run_served(case, metrics=metrics)


def test_nobody_counts_when_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonlang.entrypoints.client.LOOK_S", 0.01)

    async def case(it: Served) -> None:
        figures = it.client.look()
        while it.client._watch is not None:
            await asyncio.sleep(0.005)
        assert it.client.look() is not figures

    run_served(case)


def test_one_survey_serves_all_who_ask_at_once() -> None:
    async def case(it: Served) -> None:
        answers = await asyncio.gather(*(it.http.get("/ui/tree?nodes=10") for _ in range(5)))
        assert [answer.json()["texts"] for answer in answers] == [["", "Hi"]] * 5
        trees = [call for call in it.engine.wait_for(Control) if call.verb == "tree"]
        assert [call.args for call in trees] == [{"nodes": 10}]

    run_served(case)


@pytest.mark.parametrize("nodes", ["0", "-1", "x", "10001", "9" * 30])
def test_a_tree_of_impossible_size_is_refused(nodes: str) -> None:
    async def case(it: Served) -> None:
        assert (await it.http.get(f"/ui/tree?nodes={nodes}")).status_code == 400

    run_served(case)


def test_a_chat_stream_ends_with_its_receipt_when_asked() -> None:
    async def case(it: Served) -> None:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        plain = await it.http.post("/v1/chat/completions", json=body)
        assert "meta_info" not in plain.text
        found = await it.http.post("/v1/chat/completions", json=body | {"return_meta_info": True})
        assert found.text.count('"meta_info"') == 1
        whole = await it.http.post("/v1/chat/completions", json=body | {"return_meta_info": True, "stream": False})
        meta = whole.json()["choices"][0]["meta_info"]
        assert meta["completion_tokens"] == whole.json()["usage"]["completion_tokens"]
        assert [stage["name"] for stage in meta["receipt"]["stages"]] == ["queue", "compute"]

    run_served(case)
