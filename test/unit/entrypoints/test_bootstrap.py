"""The bootstrap server: SGLang's calls, Mooncake's metadata, several instances behind one port."""

from __future__ import annotations

import socket

import pytest
from free_ports import free_port
from starlette.testclient import TestClient

from moonlang.base import clock
from moonlang.base.errors import ConfigError, PeerError
from moonlang.config.server_args import ServerArgs
from moonlang.disaggregation import bootstrap
from moonlang.disaggregation.frames import TOKEN_VARIABLE
from moonlang.disaggregation.registry import ROUTE_NS, Registry, Route
from moonlang.entrypoints.bootstrap import BootstrapHost, BootstrapRoutes

ALL = bootstrap.QUERY


@pytest.fixture
def client() -> TestClient:
    return TestClient(BootstrapRoutes(Registry(), "").app())


def test_sglang_ranks(client: TestClient) -> None:
    assert client.get("/health").text == "OK"
    assert client.get(ALL).status_code == 503
    assert client.get("/route").status_code == 400
    for rank in range(2):
        assert client.get(ALL).status_code == 503, "not before every rank has come"
        route = {
            "attn_tp_size": 2,
            "attn_tp_rank": rank,
            "rank_ip": "10.0.0.1",
            "rank_port": 5000 + rank,
            "page_size": 16,
        }
        assert client.put("/route", json=route).text == "OK"
    found = client.get(ALL).json()
    assert (found["attn_tp_size"], found["page_size"], found["dp_size"]) == (2, 16, 1)
    one = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank={}&target_pp_rank=0"
    assert client.get(one.format(1)).json() == {"rank_ip": "10.0.0.1", "rank_port": 5001}
    assert client.get(one.format(7)).status_code == 404


def test_sglang_rooms(client: TestClient) -> None:
    client.post("/register_dp_rank", json={"bootstrap_room": 12, "dp_rank": 3})
    assert client.post("/query_dp_ranks", json={"bootstrap_rooms": [12, 13]}).json() == {"12": 3}


def test_metadata_of_mooncake(client: TestClient) -> None:
    assert client.get("/metadata", params={"key": "a/b"}).status_code == 404
    for value in ("one", "two"):  # the second time: an engine that has started again
        assert client.put("/metadata", params={"key": "a/b"}, content=value).status_code == 200
        assert client.get("/metadata", params={"key": "a/b"}).text == value
    assert client.delete("/metadata", params={"key": "a/b"}).status_code == 200
    assert client.delete("/metadata", params={"key": "a/b"}).status_code == 404


def test_nonsense_is_refused(client: TestClient) -> None:
    assert client.put("/route", content=b"{").status_code == 400
    assert client.post("/query_dp_ranks", json={"bootstrap_rooms": "x"}).status_code == 400


def test_changes_need_the_token() -> None:
    client = TestClient(BootstrapRoutes(Registry(), "secret").app())
    assert client.put("/route", json={}).status_code == 401
    assert client.put("/route", json={}, headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_route_that_is_not_repeated_is_forgotten() -> None:
    registry = Registry()
    registry.put(Route(instance="p1", host="h", port=1), 0)
    registry.put(Route(instance="p2", host="h", port=2), ROUTE_NS // 2)
    overview = registry.overview(ROUTE_NS)
    assert overview is not None
    assert [one["instance"] for one in overview["instances"]] == ["p2"]
    registry.withdraw("p2")
    assert registry.overview(ROUTE_NS) is None


@pytest.fixture
def args() -> ServerArgs:
    return ServerArgs(disaggregation_bootstrap_port=free_port(), page_size=16)


def names(args: ServerArgs) -> set[str]:
    try:
        return {one.instance for one in bootstrap.instances((args.host, args.disaggregation_bootstrap_port))}
    except PeerError:
        return set()


def route(name: str) -> dict[str, object]:
    return {"instance": name, "host": "127.0.0.1", "port": 1}


def test_several_share_a_port_and_one_takes_over(args: ServerArgs) -> None:
    first, second = BootstrapHost(args), BootstrapHost(args)
    first.announce(route("p1"))
    second.announce(route("p2"))
    assert names(args) == {"p1", "p2"}
    first.close()
    deadline_ns = clock.monotonic_ns() + 60 * clock.NS_PER_S
    while names(args) != {"p2"}:
        assert clock.monotonic_ns() < deadline_ns
    third = BootstrapHost(args)
    third.announce(route("p3"))
    assert names(args) == {"p2", "p3"}
    third.close()
    assert names(args) == {"p2"}
    second.close()


def test_a_port_that_something_else_has(args: ServerArgs) -> None:
    with socket.socket() as other:
        other.bind((args.host, args.disaggregation_bootstrap_port))
        other.listen()
        with pytest.raises(ConfigError, match="--disaggregation-bootstrap-port"):
            BootstrapHost(args)


def test_the_token_is_sent(args: ServerArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    host = BootstrapHost(args)
    try:
        host.announce(route("p1"))
        assert names(args) == {"p1"}
        with pytest.raises(PeerError, match="token"):
            bootstrap.register(host.site, route("p2"))
    finally:
        host.close()


def test_port_0_is_a_free_one_that_it_knows() -> None:
    args = ServerArgs(disaggregation_bootstrap_port=0, page_size=16)
    hosts = [BootstrapHost(args), BootstrapHost(args)]
    try:
        ports = [host.site[1] for host in hosts]
        assert len(set(ports)) == 2
        assert 0 not in ports
        for host in hosts:
            host.announce(route(str(host.site[1])))
            assert [one.instance for one in bootstrap.instances(host.site)] == [str(host.site[1])]
    finally:
        for host in hosts:
            host.close()
