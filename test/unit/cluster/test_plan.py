"""What servers and router are started with."""

from __future__ import annotations

import json

from moonlang.cluster import plan
from moonlang.cluster.plan import Host, Invitation
from moonlang.config.server_args import ServerArgs, parse
from moonlang.router.args import parse as parse_router


def invitation(*flags: str, master: str = "") -> Invitation:
    return Invitation(version="1", name="moon", pairs=True, flags=flags, master=master, store_size="1gb")


def test_no_server_needs_a_port() -> None:
    host = Host(address="10.0.0.1", count=2)
    shared, known = invitation("--tp-size", "2"), ServerArgs(tp_size=2)
    alone, prefill, decode = (parse(plan.server(role, shared, known, host)) for role in plan.ROLES.values())
    assert {args.port for args in (prefill, decode, alone)} == {0}
    assert prefill.disaggregation_bootstrap_port == 0
    assert [args.disaggregation_mode for args in (prefill, decode, alone)] == ["prefill", "decode", "null"]
    assert {(args.host, args.tp_size) for args in (prefill, decode, alone)} == {("10.0.0.1", 2)}


def test_servers_of_a_host_share_its_memory_unless_told() -> None:
    two, one = Host(address="::1", count=2), Host(address="::1", count=1)
    assert parse(plan.server("decode", invitation(), ServerArgs(), two)).mem_fraction_static == 0.25
    assert parse(plan.server("decode", invitation(), ServerArgs(), one)).mem_fraction_static is None
    said = ServerArgs(mem_fraction_static=0.6)
    flags = ("--mem-fraction-static", "0.6")
    assert parse(plan.server("decode", invitation(*flags), said, two)).mem_fraction_static == 0.6


def test_with_a_store_every_server_knows_its_master() -> None:
    for role in plan.ROLES.values():
        host = Host(address="10.0.0.1", count=2)
        args = parse(plan.server(role, invitation(master="10.0.0.1:7"), ServerArgs(), host))
        settings = json.loads(args.hicache_storage_backend_extra_config or "")
        assert (settings["master_server_address"], settings["local_hostname"]) == ("10.0.0.1:7", "10.0.0.1")
        assert args.hicache_storage_backend == "mooncake"
        assert args.disaggregation_decode_enable_offload_kvcache == (role == "decode")


def test_every_server_has_gpus_of_its_own() -> None:
    host = Host(address="::1", count=2, gpus=("0", "1", "4", "5"))
    found = [plan.environment(number, 2, host, {}) for number in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0,1", "4,5"]


def test_servers_that_share_cores_are_not_bound_to_them_unless_told() -> None:
    assert plan.environment(0, 1, Host(address="::1", count=2), {}) == {"MOONLANG_CPU_PIN": "0"}
    assert plan.environment(0, 1, Host(address="::1", count=1), {}) == {}
    assert plan.environment(0, 1, Host(address="::1", count=2), {"MOONLANG_CPU_PIN": "1"}) == {}


def test_the_router_understands_its_flags_and_the_users_win() -> None:
    flags = plan.router(True, ServerArgs(api_key="key"), "/card", ("--policy", "random", "--api-key", "other"))
    args = parse_router(flags)
    assert (args.pairs, args.cluster_card, args.policy, args.api_key) == (True, "/card", "random", "other")
