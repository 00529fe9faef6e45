"""Servers of different numbers of ranks share one store, and answer with the bits that they would have computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mooncake_services
import pytest
from hicache_servers import PATIENT, PROMPT_TOKENS, CachedServer, prompt

MOST = PROMPT_TOKENS - 16


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, CachedServer]]:
    """One server of one rank and one of two, on one store."""
    folder = tmp_path_factory.mktemp("store")
    with (
        mooncake_services.master(folder) as master,
        mooncake_services.store_service(folder, master.address, "64mb"),
    ):
        extra = {"master_server_address": master.address, "protocol": "tcp", "global_segment_size": 0}
        extra["local_buffer_size"] = "1mb"
        with (
            CachedServer(folder, *PATIENT, backend="mooncake", extra=extra) as one,
            CachedServer(folder, *PATIENT, "--tp-size", "2", backend="mooncake", extra=extra) as two,
        ):
            yield {1: one, 2: two}


@pytest.mark.parametrize(("writer", "reader"), [(1, 2), (2, 1)])
def test_what_one_writes_the_other_reads(servers: dict[int, CachedServer], writer: int, reader: int) -> None:
    cold = servers[writer].ask(prompt(writer))
    assert cold.details["storage"] == 0
    servers[writer].settle()
    found = servers[reader].ask(prompt(writer))
    assert found.details["storage"] == MOST
    assert found.same(cold)


def test_two_ranks_find_their_own_in_every_tier(servers: dict[int, CachedServer]) -> None:
    server = servers[2]
    cold = server.ask(prompt(7))
    server.settle()
    for seed in range(100, 108):  # more than the device pool holds
        server.ask(prompt(seed))
    server.settle()
    from_host = server.ask(prompt(7))
    assert from_host.details["host"] == MOST
    server.settle()
    server.flush()
    from_store = server.ask(prompt(7))
    assert from_store.details["storage"] == MOST
    assert cold.same(from_host)
    assert cold.same(from_store)


def test_another_dtype_finds_nothing(servers: dict[int, CachedServer], tmp_path: Path) -> None:
    servers[1].ask(prompt(9))
    servers[1].settle()
    extra = {"master_server_address": servers[1].extra["master_server_address"], "protocol": "tcp"}
    flags = (*PATIENT, "--tp-size", "2", "--kv-cache-dtype", "fp8_e4m3")
    with CachedServer(tmp_path, *flags, backend="mooncake", extra={**extra, "global_segment_size": 0}) as other:
        assert other.ask(prompt(9)).details["storage"] == 0
