"""What the doctor says of Mooncake."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError
from moonlang.mooncake import lib, probe
from moonlang.mooncake.config import MooncakeConfig, metadata_server

needs_wheel = pytest.mark.skipif(bool(lib.how_to_get()), reason=f"Mooncake is not there: {lib.how_to_get()}")


def test_cards_are_the_entries_of_the_folder(tmp_path: Path) -> None:
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / name).mkdir()
    assert probe.hardware(tmp_path).infiniband == ("mlx5_0", "mlx5_1")
    assert probe.hardware(tmp_path / "none").infiniband == ()


def test_a_server_on_all_addresses_has_one_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.reachable("10.1.2.3") == "10.1.2.3"
    with socket.socket() as own:
        own.bind((probe.reachable("0.0.0.0"), 0))  # it is one of this machine

    class NoNetwork(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError("Network is unreachable")

    monkeypatch.setattr(probe.socket, "socket", NoNetwork)
    assert probe.reachable("0.0.0.0") == "127.0.0.1"


def test_a_missing_wheel_is_one_line_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "version", lambda: "")
    (finding,) = probe.probe({})
    assert finding.status == "warning"
    assert "its wheel missing" in finding.text
    assert "pip install" in finding.fix


@needs_wheel
def test_a_good_set_up_has_nothing_to_fix() -> None:
    assert [finding.fix for finding in probe.probe({"MOONCAKE_PROTOCOL": "tcp"})] == ["", "", ""]


@needs_wheel
def test_a_set_up_that_cannot_work_fails_with_the_fix() -> None:
    *_, finding = probe.probe({"MOONCAKE_PROTOCOL": "rdma", "MC_LOG_DIR": "/tmp"}, device="no_such_card")
    assert finding.status == "failed"
    assert "tcp" in finding.fix


@needs_wheel
def test_an_absent_metadata_server_is_a_warning() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{bound.getsockname()[1]}/metadata"
        findings = {f.name: f for f in probe.probe({"MOONCAKE_TE_META_DATA_SERVER": server, "MC_FORCE_TCP": "1"})}
    assert findings["metadata server"].status == "warning"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        findings = {f.name: f for f in probe.probe({"MOONCAKE_TE_META_DATA_SERVER": server, "MC_FORCE_TCP": "1"})}
    assert findings["metadata server"].status == "ok"


@needs_wheel
def test_redis_is_refused_before_the_wheel_aborts_and_says_what_to_use() -> None:
    config = MooncakeConfig(local_hostname="h", metadata_server="redis://127.0.0.1:6379")
    with pytest.raises(ConfigError, match="no support") as refused:
        probe.check_metadata(config)
    assert "P2PHANDSHAKE" in refused.value.hint


def test_redis_works_with_a_wheel_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a wheel ends in order, whether it finds a server or not."""
    monkeypatch.setattr(lib, "transfer_engine", lambda: None)
    monkeypatch.setattr(probe, "_TRY_METADATA", "raise SystemExit(1)")
    probe.check_metadata(MooncakeConfig(local_hostname="h", metadata_server="redis://127.0.0.1:6379"))


@pytest.mark.parametrize(
    ("server", "addresses"),
    [
        ("http://a/metadata", [("a", 80)]),
        ("https://a:8998/metadata", [("a", 8998)]),
        ("etcd://a:1,b:2", [("a", 1), ("b", 2)]),
        ("[::1]:2379", [("::1", 2379)]),
    ],
)
def test_addresses_of_metadata_servers(server: str, addresses: list[tuple[str, int]]) -> None:
    config = MooncakeConfig(local_hostname="h", metadata_server=metadata_server(server))
    assert probe.metadata_addresses(config) == addresses
