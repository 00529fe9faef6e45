"""What routers add to a request for a pair of servers: bootstrap_host, bootstrap_port, bootstrap_room."""

from __future__ import annotations

from typing import Any

import pytest
from fake_app import Served, run_served

from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Generate
from moonlang.core.pairing import PeerSpec
from moonlang.entrypoints.pairing import ROOMS

PLACE = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 77}
CHAT = {"messages": [{"role": "user", "content": "ab"}]}
CALLS = [("/generate", {"text": "ab"}), ("/v1/completions", {"prompt": "ab"}), ("/v1/chat/completions", CHAT)]


def args(mode: str) -> ServerArgs:
    return ServerArgs(disaggregation_mode=mode, disaggregation_bootstrap_port=9111)


def peers(it: Served, count: int) -> list[PeerSpec | None]:
    return [message.peer for message in it.engine.wait_for(Generate, count)]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(("path", "body"), CALLS)
def test_the_place_reaches_the_scheduler(path: str, body: dict[str, Any], mode: str) -> None:
    async def case(it: Served) -> None:
        assert (await it.http.post(path, json={**body, **PLACE})).status_code == 200
        assert peers(it, 1) == [PeerSpec("10.0.0.1", 8998, 77)]

    run_served(case, args(mode))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(("path", "body"), CALLS)
def test_no_room_is_refused(path: str, body: dict[str, Any], mode: str) -> None:
    async def case(it: Served) -> None:
        for extra in ({}, {"bootstrap_host": "10.0.0.1", "bootstrap_room": None}):
            response = await it.http.post(path, json={**body, **extra})
            assert response.status_code == 400
            assert "Disaggregated request received without bootstrap room id" in response.text

    run_served(case, args(mode))


def test_a_server_that_works_alone_overlooks_them() -> None:
    async def case(it: Served) -> None:
        for path, body in CALLS:
            assert (await it.http.post(path, json={**body, **PLACE})).status_code == 200
        assert peers(it, 3) == [None] * 3

    run_served(case)


def test_lists_hold_one_place_per_prompt_and_samples_the_rooms_behind() -> None:
    async def case(it: Served) -> None:
        places = {"bootstrap_host": ["a", "b"], "bootstrap_port": [1, None], "bootstrap_room": [10, ROOMS - 1]}
        body = {"text": ["ab", "cd"], "sampling_params": {"n": 2, "max_new_tokens": 1}, **places}
        assert (await it.http.post("/generate", json=body)).status_code == 200
        a, b = (lambda room: PeerSpec("a", 1, room)), (lambda room: PeerSpec("b", 9111, room))
        assert peers(it, 4) == [a(10), a(11), b(ROOMS - 1), b(0)]

    run_served(case, args("decode"))


def test_lists_may_hold_one_place_per_sequence() -> None:
    async def case(it: Served) -> None:
        places = {"bootstrap_host": ["a", "b"], "bootstrap_port": [1, 2], "bootstrap_room": [10, 5]}
        assert (await it.http.post("/v1/chat/completions", json={**CHAT, "n": 2, **places})).status_code == 200
        assert peers(it, 2) == [PeerSpec("a", 1, 10), PeerSpec("b", 2, 5)]

    run_served(case, args("decode"))


def test_one_room_for_a_batch_is_the_first_of_as_many() -> None:
    async def case(it: Served) -> None:
        body = {"prompt": ["ab", "cd"], "n": 2, **PLACE}
        assert (await it.http.post("/v1/completions", json=body)).status_code == 200
        rooms = [peer.room for peer in peers(it, 4) if peer is not None]
        assert rooms == [77, 78, 79, 80]

    run_served(case, args("prefill"))


def test_the_host_that_nobody_dials_means_alone() -> None:
    async def case(it: Served) -> None:
        body = {"text": "ab", "bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
        assert (await it.http.post("/generate", json=body)).status_code == 200
        assert peers(it, 1) == [None]

    run_served(case, args("decode"))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"bootstrap_room": -1}, "2^63"),
        ({"bootstrap_room": ROOMS}, "2^63"),
        ({"bootstrap_room": [1, 2]}, "one per prompt"),
        ({"bootstrap_room": "7"}, "bootstrap_room"),
        ({"bootstrap_port": 0}, "65535"),
        ({"bootstrap_host": None}, "bootstrap_host"),
        ({"bootstrap_host": ["a"] * 3}, "one per prompt"),
    ],
)
def test_a_place_that_cannot_be(wrong: dict[str, Any], word: str) -> None:
    async def case(it: Served) -> None:
        response = await it.http.post("/generate", json={"text": "ab", **PLACE, **wrong})
        assert response.status_code == 400
        assert word in response.json()["error"]["message"]

    run_served(case, args("decode"))


def test_two_sequences_cannot_share_a_room() -> None:
    async def case(it: Served) -> None:
        body = {**PLACE, "text": ["ab", "cd"], "bootstrap_room": [5, 6], "sampling_params": {"n": 2}}
        response = await it.http.post("/generate", json=body)
        assert response.status_code == 400
        assert "same room" in response.json()["error"]["message"]

    run_served(case, args("decode"))


@pytest.mark.parametrize("mode", ["null", "prefill", "decode"])
def test_what_routers_read_at_their_start(mode: str) -> None:
    async def case(it: Served) -> None:
        info = (await it.http.get("/server_info")).json()
        assert (info["disaggregation_mode"], info["disaggregation_bootstrap_port"]) == (mode, 9111)
        assert (info["tp_size"], info["dp_size"], info["load_balance_method"]) == (1, 1, "auto")
        assert (await it.http.get("/model_info")).json()["disaggregation_mode"] == mode
        (load,) = (await it.http.get("/get_load")).json()
        assert set(load) == {"dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens"}

    run_served(case, args(mode))
