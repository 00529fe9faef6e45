"""A mixture of experts whose tokens travel by Mooncake: the documented command, alone and over ranks and pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from live_server import LiveServer, free_ports
from pd_servers import couple
from tiny_folder import write_tiny_folder

from moonlang.models.registry import specs

EXCHANGE = ("--moe-a2a-backend", "mooncake", "--mooncake-ib-device", "mlx5_0")
FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "8000", "--random-seed", "1", "--grammar-backend", "none")
TWO = ("--tp-size", "2", "--enable-two-batch-overlap")
MOVING = (
    *("--enable-eplb", "--ep-num-redundant-experts", "2", "--eplb-rebalance-num-iterations", "20"),
    *("--eplb-rebalance-layers-per-chunk", "1", "--enable-metrics"),
)
SAMPLING = {"temperature": 0.8, "sampling_seed": 3, "max_new_tokens": 12, "ignore_eos": True}
BODIES = [
    {"text": "Once upon a time " * 12, "sampling_params": {"temperature": 0, "max_new_tokens": 12}},
    {"text": "To the lighthouse", "sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": 2},
]


def answer(found: dict[str, Any]) -> tuple[Any, ...]:
    return found["output_ids"], found["meta_info"].get("output_token_logprobs")


def answers(server: LiveServer) -> list[tuple[Any, ...]]:
    found = [server.http.post("/generate", json=body) for body in BODIES]
    assert [one.status_code for one in found] == [200, 200], server.log
    return [answer(one.json()) for one in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in shape, with bytes for tokens."""
    made = write_tiny_folder(tmp_path_factory.mktemp("deepseek"))
    write_checkpoint(
        made, specs()["deepseek_v3"].tiny() | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
    )
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[list[tuple[Any, ...]]]:
    """What the documented command answers: one rank, on a machine without network cards of that kind."""
    with LiveServer(folder, "--model-path", str(folder), *FLAGS, *EXCHANGE) as server:
        yield answers(server)
        assert "no RDMA card mlx5_0" in server.log


def test_two_ranks(folder: Path, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    with LiveServer(tmp_path, "--model-path", str(folder), *FLAGS, *EXCHANGE, *TWO) as server:
        run = server.run_directory()
        assert answers(server) == expected
        assert "through shared memory" in server.log
    assert not list(Path("/dev/shm").glob(f"{run.name}*"))


def test_experts_that_move(folder: Path, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """While requests run, to ranks where they balance the load: no answer changes."""
    with LiveServer(tmp_path, "--model-path", str(folder), *FLAGS, *EXCHANGE, *TWO, *MOVING) as server:
        rebalanced(server, expected)
        assert answers(server) == expected
    assert "balancedness: " in server.log


def rebalanced(server: LiveServer, expected: list[tuple[Any, ...]]) -> None:
    """Asks until experts have moved, and checks every answer. All the steps there are come from these requests."""
    for _ in range(100):
        assert answers(server) == expected
        found = re.search(r"^moonlang:eplb_rebalances_total{.*} (.*)$", server.http.get("/metrics").text, re.MULTILINE)
        assert found is not None
        if float(found[1]) > 0:
            return
    raise AssertionError("nothing has moved")


def test_ranks_on_two_nodes(folder: Path, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """By the transfer engine, on TCP."""
    nodes = ("--tp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_ports()}")
    flags = ("--model-path", str(folder), *FLAGS, *EXCHANGE, *nodes)
    follower = LiveServer(tmp_path, *flags, "--node-rank", "1")
    try:
        with LiveServer(tmp_path, *flags) as server:
            assert answers(server) == expected
            assert "by Mooncake's transfer engine" in server.log
        follower.process.wait(60)
    finally:
        follower.close()


def test_a_pair_of_unequal_ranks(folder: Path, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Latents computed by one rank, and read by two."""
    flags = ("--model-path", str(folder), *FLAGS, *EXCHANGE)
    with couple(tmp_path, "local", prefill=flags, decode=(*flags, *TWO)) as both:
        assert [answer(both.ask(body).json()) for body in BODIES] == expected


def test_experts_of_ranks_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    server = LiveServer(tmp_path, "--model-path", str(folder), "--tp-size", "2", "--ep-size", "4")
    try:
        assert server.process.wait(120) == 2
        assert "--ep-size 4 does not divide --tp-size 2" in server.log
    finally:
        server.close()


def test_replicas_that_share_experts(folder: Path, expected: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """DP attention: each has requests of its own, in steps that all take together. Meanwhile experts move."""
    flags = (*MOVING, "--tp-size", "2", "--dp-size", "2", "--enable-dp-attention", "--enable-two-batch-overlap")
    asked = [({**body, "routed_dp_rank": rank}, number) for rank in (0, 1) for number, body in enumerate(BODIES)]

    def right(server: LiveServer, body: dict[str, Any], number: int) -> bool:
        response = server.http.post("/generate", json=body)
        assert response.status_code == 200, server.log
        return answer(response.json()) == expected[number]

    with LiveServer(tmp_path, "--model-path", str(folder), *FLAGS, *EXCHANGE, *flags) as server:
        run = server.run_directory()
        assert all(right(server, *one) for one in asked)  # the other replica has nothing to do
        rebalanced(server, expected)
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda one: right(server, *one), asked * 6))
        server.wait_idle()
        assert right(server, *asked[0])
        assert server.stop() == 0
        assert "Traceback" not in server.log
    assert not list(Path("/dev/shm").glob(f"{run.name}*"))
