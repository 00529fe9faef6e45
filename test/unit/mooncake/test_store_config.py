"""Where the Mooncake store's settings come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError
from moonlang.mooncake import store_config
from moonlang.mooncake.config import P2P, Hardware
from moonlang.mooncake.store_config import STORE_CONFIG_PATH, StoreConfig

NO_CARDS = Hardware()


def read(extra: dict[str, object], environ: dict[str, str] | None = None) -> StoreConfig:
    return store_config.read(extra, environ or {}, NO_CARDS, host="10.0.0.1")


def test_defaults() -> None:
    found = read({"master_server_address": "m:50051"})
    assert (found.master, found.segment_bytes, found.buffer_bytes) == ("m:50051", 4 << 30, 16 << 20)
    assert (found.transfer.metadata_server, found.transfer.protocol) == (P2P, "tcp")
    assert found.transfer.local_hostname == "10.0.0.1"


def test_extra_config_before_the_file_before_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    path.write_text(json.dumps({"master_server_address": "file:1", "global_segment_size": "2gb", "tenant_id": "t"}))
    environ = {
        STORE_CONFIG_PATH: str(path),
        "MOONCAKE_MASTER": "environment:1",
        "MOONCAKE_TENANT_ID": "environment",
        "MOONCAKE_TE_META_DATA_SERVER": "http://127.0.0.1:8080/metadata",
    }
    found = read({"global_segment_size": 0}, environ)
    assert found.master == "file:1"
    assert found.segment_bytes == 0
    assert found.tenant == "t"
    assert found.transfer.metadata_server == "http://127.0.0.1:8080/metadata"


def test_sizes_from_the_environment_are_numbers_or_have_a_unit() -> None:
    for text, size in (("4294967296", 1 << 32), ("512mb", 512 << 20), ("0", 0)):
        assert read({}, {"MOONCAKE_MASTER": "m:1", "MOONCAKE_GLOBAL_SEGMENT_SIZE": text}).segment_bytes == size


def test_a_client_of_the_host_needs_no_master() -> None:
    found = read({"standalone_storage": True, "client_server_address": "127.0.0.1:18062"})
    assert found.client == "127.0.0.1:18062"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({}, "mooncake_master"),
        ({"master_server_address": "m:1", "speed": "high"}, "speed"),
        ({"master_server_address": "m:1", "global_segment_size": "much"}, "global_segment_size"),
        ({"master_server_address": "m:1", "global_segment_size": "8mb"}, "16mb"),
        ({"master_server_address": "m:1", "protocol": "rdma"}, "libibverbs"),
        ({"master_server_address": "m:1", "metadata_server": "nonsense"}, "nonsense"),
    ],
)
def test_what_is_wrong_is_named(extra: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(extra)
    assert says in str(caught.value)
