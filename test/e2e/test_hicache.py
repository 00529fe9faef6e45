"""Conversations come back from host memory and from a Mooncake store, bit for bit as they were computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mooncake_services
import pytest
from hicache_servers import PATIENT, POOL_TOKENS, PROMPT_TOKENS, CachedServer, prompt
from mooncake_services import Master

MOST = PROMPT_TOKENS - 16  # the last token is always computed, and its page with it


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    """A master, and the memory of the store in a process of its own, as documented."""
    folder = tmp_path_factory.mktemp("store")
    with (
        mooncake_services.master(folder) as running,
        mooncake_services.store_service(folder, running.address, "64mb"),
    ):
        yield running


@pytest.fixture(scope="module")
def server(master: Master, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CachedServer]:
    """Configured by the environment."""
    environment = {
        "MOONCAKE_MASTER": master.address,
        "MOONCAKE_PROTOCOL": "tcp",
        "MOONCAKE_GLOBAL_SEGMENT_SIZE": "0",
        "MOONCAKE_LOCAL_BUFFER_SIZE": "1mb",
    }
    folder = tmp_path_factory.mktemp("server")
    with CachedServer(folder, *PATIENT, backend="mooncake", environment=environment) as running:
        yield running


def crowd_out(server: CachedServer) -> None:
    """Ask for other things until the device pool has forgotten all else."""
    for seed in range(1000, 1000 + POOL_TOKENS // PROMPT_TOKENS + 2):
        server.ask(prompt(seed))
    server.settle()


def test_every_tier_gives_the_same_answer(server: CachedServer) -> None:
    cold = server.ask(prompt(1))
    assert cold.details["storage"] == 0
    server.settle()
    warm = server.ask(prompt(1))
    assert (warm.details["device"], warm.details["storage_miss"]) == (MOST, "complete")
    crowd_out(server)
    from_host = server.ask(prompt(1))
    assert from_host.details["host"] == MOST
    server.settle()
    server.flush()
    from_store = server.ask(prompt(1))
    assert (from_store.details["storage"], from_store.details["storage_backend"]) == (MOST, "mooncake")
    assert cold.same(warm)
    assert cold.same(from_host)
    assert cold.same(from_store)


def test_servers_that_never_saw_a_prompt_find_it(server: CachedServer, master: Master, tmp_path: Path) -> None:
    """One is configured by a file, the other by a flag that wins over it; one has another page size."""
    cold = server.ask(prompt(2))
    server.settle()
    extra = {"master_server_address": master.address, "protocol": "tcp", "global_segment_size": "16mb"}
    file = tmp_path / "store.json"
    file.write_text(json.dumps({**extra, "local_buffer_size": "1mb"}))
    environment = {"SGLANG_HICACHE_MOONCAKE_CONFIG_PATH": str(file)}
    with CachedServer(tmp_path, *PATIENT, backend="mooncake", environment=environment) as second:
        found = second.ask(prompt(2))
        assert found.details["storage"] == MOST
        assert cold.same(found)
        second.ask(prompt(3))
        second.settle()
        assert server.ask(prompt(3)).details["storage"] == MOST, "it works both ways"
    file.write_text(json.dumps({**extra, "master_server_address": "127.0.0.1:1"}))
    flags = (*PATIENT, "--page-size", "32")
    with CachedServer(tmp_path, *flags, backend="mooncake", extra=extra, environment=environment) as other:
        assert other.ask(prompt(2)).details["storage"] == 0, "a page is not a part of another page"


def test_a_server_that_starts_again_finds_what_it_had(server: CachedServer) -> None:
    cold = server.ask(prompt(4))
    server.settle()
    server.stop()
    server.start_again()
    server.wait_until_up()
    found = server.ask(prompt(4))
    assert found.details["storage"] == MOST
    assert cold.same(found)


@pytest.mark.parametrize("key", [{"cache_salt": "mine"}, {"extra_key": "mine"}])
def test_salted_prompts_are_shared_with_their_like_only(server: CachedServer, key: dict[str, str]) -> None:
    seed = 5 if "cache_salt" in key else 6
    plain = server.ask(prompt(seed))
    server.settle()
    salted = server.ask(prompt(seed), **key)
    assert salted.details["device"] == salted.details["host"] == salted.details["storage"] == 0
    server.settle()
    server.flush()
    again = server.ask(prompt(seed), **key)
    assert again.details["storage"] == MOST
    assert plain.same(salted)
    assert plain.same(again)


def test_stores_come_and_go_while_it_runs(server: CachedServer, master: Master, tmp_path: Path) -> None:
    route = "/hicache/storage-backend"
    assert server.http.get(route).json()["hicache_storage_backend"] == "mooncake"
    server.ask(prompt(7))
    server.settle()
    assert server.http.delete(route).status_code == 200
    assert server.http.delete(route).status_code == 400
    assert server.http.get(route).json()["hicache_storage_backend"] is None
    assert server.http.get("/get_hicache_l3_cache_layout").json()["enabled"] is False
    server.flush()
    without = server.ask(prompt(7))
    assert without.details["device"] + without.details["host"] == 0
    folder = {"hicache_storage_backend": "file"}
    folder["hicache_storage_backend_extra_config_json"] = json.dumps({"directory": str(tmp_path / "pages")})
    assert server.http.put(route, json=folder).status_code == 200
    assert server.http.put(route, json=folder).status_code == 400
    server.ask(prompt(8))
    server.settle()
    server.flush()
    assert server.ask(prompt(8)).details["storage"] == MOST
    server.settle()
    assert server.http.post(f"{route}/clear").status_code == 200
    server.flush()
    assert server.ask(prompt(8)).details["storage"] == 0
    server.settle()
    assert server.http.delete(route).status_code == 200
    back = {"hicache_storage_backend": "mooncake"}
    assert server.http.put(route, json=back).status_code == 200
    server.flush()
    assert server.ask(prompt(7)).details["storage"] == MOST


def test_metrics_tell_of_every_tier(server: CachedServer) -> None:
    server.ask(prompt(9))
    server.settle()
    server.flush()
    server.ask(prompt(9))
    server.settle()
    for name in (
        "sglang:prefetched_tokens_total",
        "sglang:backuped_tokens_total",
        "sglang:hicache_host_used_tokens",
        "sglang:hicache_host_total_tokens",
        "moonlang:tier_hit_tokens_total",
        "moonlang:store_bytes_total",
        "moonlang:store_ops_total",
        "moonlang:store_busy_seconds_total",
    ):
        assert server.metric(name) > 0, name


@pytest.mark.parametrize("policy", ["write_through_selective", "write_back"])
def test_other_write_policies(tmp_path: Path, policy: str) -> None:
    flags = ("--hicache-write-policy", policy, *PATIENT)
    with CachedServer(tmp_path, *flags, backend="file", extra={"directory": str(tmp_path / "pages")}) as one:
        one.ask(prompt(1))
        assert one.settle()["total_saved_tokens"] == 0
        if policy == "write_through_selective":
            one.ask(prompt(1))
        else:
            crowd_out(one)
        assert one.settle()["total_saved_tokens"] >= MOST
        one.flush()
        assert one.ask(prompt(1)).details["storage"] == MOST
