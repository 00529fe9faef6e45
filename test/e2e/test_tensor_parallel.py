"""Servers of several ranks answer as one of one rank does, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from live_server import LiveServer, free_ports
from packers import FORMATS, write_packed
from pd_servers import couple
from ranked_answers import BODIES, FLAGS, STORY, answers, sampled
from tiny_folder import write_tiny_folder


@pytest.fixture(scope="module", params=[("2", "zmq"), ("4", "mooncake")], ids="-".join)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Plans go over sockets to the one, through a ring to the other."""
    size, backend = request.param
    flags = (*FLAGS, "--tp-size", size, "--messaging-backend", backend)
    with LiveServer(tmp_path_factory.mktemp("ranks"), *flags) as running:
        yield running


@pytest.mark.parametrize("name", BODIES)
def test_the_same_bits(server: LiveServer, ranks: LiveServer, name: str) -> None:
    assert answers(ranks, BODIES[name]) == answers(server, BODIES[name])


def test_a_lost_rank_ends_the_server(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS, "--tp-size", "2") as running:
        run = running.run_directory()
        os.kill(running.roles()["worker-1"], signal.SIGKILL)
        assert running.process.wait(60) != 0
        assert "worker-1 was killed by SIGKILL" in running.log
    assert not list(Path("/dev/shm").glob(f"{run.name}*"))


def test_an_orderly_end_is_quiet(tmp_path: Path) -> None:
    with LiveServer(tmp_path, *FLAGS, "--tp-size", "2") as running:
        answers(running, BODIES["greedy"])
        running.process.terminate()
        running.process.wait(60)
        assert "Traceback" not in running.log


@pytest.mark.parametrize(("size", "why"), [("3", "1, 2, 4 or 8"), ("8", "attention heads")])
def test_models_that_cannot_be_shared(size: str, why: str, tmp_path: Path) -> None:
    server = LiveServer(tmp_path, "--tp-size", size)
    try:
        assert server.process.wait(120) == 2
        assert why in server.log
    finally:
        server.close()


@pytest.mark.parametrize("way", ["--tp-size", "--pp-size"])
def test_ranks_on_two_nodes(server: LiveServer, way: str, tmp_path: Path) -> None:
    """The second node ends with the first."""
    nodes = (way, "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_ports()}")
    follower = LiveServer(tmp_path, *FLAGS, *nodes, "--node-rank", "1")
    try:
        with LiveServer(tmp_path, *FLAGS, *nodes) as running:
            for name in ("greedy", "seeded"):
                assert answers(running, BODIES[name]) == answers(server, BODIES[name])
        assert follower.process.wait(60) == 1
        assert "Rank 0 has ended" in follower.log
    finally:
        follower.close()


@pytest.mark.parametrize(("prefill", "decode"), [("1", "2"), ("2", "1")])
def test_pairs_of_unequal_ranks(server: LiveServer, prefill: str, decode: str, tmp_path: Path) -> None:
    one, other = ("--tp-size", prefill, "--chunked-prefill-size", "64"), ("--tp-size", decode)
    with couple(tmp_path, "local", prefill=one, decode=other) as both:
        for body in BODIES.values():
            response: httpx.Response = both.ask(body if isinstance(body["text"], str) else {**body, "text": STORY})
            assert response.status_code == 200, response.text
            found = response.json()
            single = {**body, "text": body["text"] if isinstance(body["text"], str) else STORY}
            ((ids, logprobs, _),) = answers(server, single)
            assert (found["output_ids"], found["meta_info"].get("output_token_logprobs")) == (ids, logprobs)
        both.wait_free()


def test_a_quantized_pair(tmp_path: Path) -> None:
    """As documented: a GPTQ checkpoint, prefill and decode of two ranks each."""
    folder = write_tiny_folder(tmp_path / "gptq", hidden_size=64, intermediate_size=160, head_dim=16)
    write_packed(folder, msgspec.json.decode((folder / "config.json").read_bytes()), *FORMATS["gptq4"])
    flags = ("--model-path", str(folder), "--tp-size", "2")
    body = sampled(STORY, temperature=0, ignore_eos=True)
    with LiveServer(tmp_path, *FLAGS, *flags[:2]) as single:
        ((ids, logprobs, _),) = answers(single, body)
    with couple(tmp_path, "mooncake", prefill=flags, decode=flags) as both:
        found = both.ask(body).json()
        assert (found["output_ids"], found["meta_info"]["output_token_logprobs"]) == (ids, logprobs)
