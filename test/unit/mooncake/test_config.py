"""Flags, mooncake.json and environment become one checked value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moonlang.base.errors import ConfigError
from moonlang.mooncake.config import P2P, Hardware, MooncakeConfig, metadata_server, read

NOTHING = Hardware(verbs=True)
CARDS = Hardware(infiniband=("mlx5_0", "mlx5_1", "erdma_0"), verbs=True)


def config_file(folder: Path, **content: Any) -> dict[str, str]:
    file = folder / "mooncake.json"
    file.write_text(json.dumps(content))
    return {"MOONCAKE_CONFIG_PATH": str(file)}


def test_without_a_word_it_is_peer_to_peer_over_tcp() -> None:
    assert read({}, NOTHING, host="10.0.0.1") == MooncakeConfig(local_hostname="10.0.0.1")


def test_the_file_of_the_documents(tmp_path: Path) -> None:
    environ = config_file(
        tmp_path,
        local_hostname="192.168.0.137",
        metadata_server="http://192.168.0.137:8998/metadata",
        protocol="rdma",
        device_name="erdma_0,mlx5_1",
    )
    assert read(environ, CARDS, host="127.0.0.1") == MooncakeConfig(
        local_hostname="192.168.0.137",
        metadata_server="http://192.168.0.137:8998/metadata",
        protocol="rdma",
        device_name="erdma_0,mlx5_1",
    )


def test_the_file_wins_over_the_environment_and_a_flag_over_both(tmp_path: Path) -> None:
    environ = config_file(tmp_path, device_name="mlx5_0", protocol="rdma")
    environ |= {"MOONCAKE_DEVICE": "mlx5_1", "MOONCAKE_PROTOCOL": "tcp", "LOCAL_HOSTNAME": "a"}
    config = read(environ, CARDS, host="h")
    assert (config.device_name, config.protocol, config.local_hostname) == ("mlx5_0", "rdma", "a")
    assert read(environ, CARDS, host="h", ib_device="erdma_0").device_name == "erdma_0"
    environ["MOONCAKE_LOCAL_HOSTNAME"] = "b"
    assert read(environ, CARDS, host="h").local_hostname == "b"


def test_empty_values_mean_nothing_was_said(tmp_path: Path) -> None:
    environ = config_file(tmp_path, local_hostname="", metadata_server="", device_name="", protocol=None)
    assert read(environ, NOTHING, host="h") == MooncakeConfig(local_hostname="h")


def test_keys_of_the_store_are_none_of_our_business(tmp_path: Path) -> None:
    environ = config_file(tmp_path, master_server_address="localhost:50051", global_segment_size=1 << 30)
    assert read(environ, NOTHING, host="h") == MooncakeConfig(local_hostname="h")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("", P2P),
        ("p2phandshake", P2P),
        ("http://a:8998/metadata", "http://a:8998/metadata"),
        ("https://a/metadata", "https://a/metadata"),
        ("a:2379", "etcd://a:2379"),
        ("etcd://a:2379", "etcd://a:2379"),
        ("etcd://a:2379,b:2380", "etcd://a:2379,b:2380"),
        ("etcd://a:2379;etcd://b:2380", "etcd://a:2379,b:2380"),
        ("[::1]:2379", "etcd://[::1]:2379"),
        ("redis://a:6379", "redis://a:6379"),
    ],
)
def test_metadata_servers_have_a_normal_form(text: str, normal: str) -> None:
    assert metadata_server(text) == normal
    assert metadata_server(normal) == normal


@pytest.mark.parametrize("text", ["a", "a:", "etcd://", "etcd://a:2379,b", "ftp://a:1", "http://", "http://a b"])
def test_other_metadata_servers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not understood") as refused:
        metadata_server(text, "mooncake.json")
    assert "etcd://HOST:2379" in refused.value.hint


@pytest.mark.parametrize(
    ("server", "kind"), [("", "p2p"), ("http://a/m", "http"), ("a:1", "etcd"), ("redis://a:1", "redis")]
)
def test_kind_of_metadata(server: str, kind: str) -> None:
    assert MooncakeConfig(local_hostname="h", metadata_server=metadata_server(server)).metadata_kind == kind


def test_rdma_is_chosen_where_a_card_is_named_or_present() -> None:
    assert read({}, CARDS, host="h").protocol == "rdma"
    assert read({}, CARDS, host="h").device_name == ""
    assert read({}, CARDS, host="h", ib_device="mlx5_0").device_name == "mlx5_0"
    assert read({"MOONCAKE_PROTOCOL": "TCP"}, CARDS, host="h").protocol == "tcp"


def test_tcp_can_be_forced() -> None:
    forced = MooncakeConfig(local_hostname="h")
    assert read({"MOONCAKE_PROTOCOL": "rdma"}, NOTHING, host="h", force_tcp=True) == forced
    assert read({"MC_FORCE_TCP": "1"}, CARDS, host="h", ib_device="mlx5_0") == forced


@pytest.mark.parametrize(
    ("hardware", "device", "message"),
    [
        (Hardware(infiniband=("mlx5_0",)), "mlx5_0", "libibverbs"),
        (NOTHING, "mlx5_0", "/sys/class/infiniband"),
        (CARDS, "mlx5_0,mlx5_7", "no network card mlx5_7"),
    ],
)
def test_rdma_says_what_is_missing(hardware: Hardware, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        read({}, hardware, host="h", ib_device=device)
    assert '"protocol": "tcp"' in refused.value.hint


def test_cards_by_accelerator(tmp_path: Path) -> None:
    by_rank = '{"0": "mlx5_0", "1": "mlx5_1,erdma_0"}'
    assert read({}, CARDS, host="h", ib_device=by_rank, rank=1).device_name == "mlx5_1,erdma_0"
    file = tmp_path / "cards.json"
    file.write_text(by_rank)
    assert read({}, CARDS, host="h", ib_device=str(file)).device_name == "mlx5_0"
    environ = config_file(tmp_path, device_name={"0": "mlx5_1"})
    assert read(environ, CARDS, host="h").device_name == "mlx5_1"
    with pytest.raises(ConfigError, match="accelerator 2"):
        read({}, CARDS, host="h", ib_device=by_rank, rank=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "JSON object"), ('{"metadata": 1}', "unknown keys: metadata"), ('{"protocol": 1}', "1")],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read({"MOONCAKE_CONFIG_PATH": str(file)}, NOTHING, host="h")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read({"MOONCAKE_CONFIG_PATH": str(tmp_path / "none.json")}, NOTHING, host="h")


def test_other_protocols_and_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match="Use one of: tcp, rdma"):
        read({"MOONCAKE_PROTOCOL": "efa"}, NOTHING, host="h")
    with pytest.raises(ConfigError, match="not a host"):
        read({"LOCAL_HOSTNAME": "a b"}, NOTHING, host="h")
