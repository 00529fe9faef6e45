"""Flags of the hierarchical cache that contradict each other are refused, and say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError
from moonlang.config import hicache
from moonlang.config.server_args import ServerArgs


def args(**changes: object) -> ServerArgs:
    return ServerArgs.create(**{"enable_hierarchical_cache": True, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"enable_hierarchical_cache": False, "hicache_storage_backend": "file"}, "--enable-hierarchical-cache"),
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
        ({"hicache_ratio": 0.5}, "more than 1"),
        ({"tp_size": 2, "nnodes": 2}, "share a host"),
        ({"hicache_storage_backend_extra_config": "{"}, "JSON object"),
        ({"hicache_storage_backend_extra_config": "[1]"}, "not an object"),
        ({"hicache_storage_backend_extra_config": "@/nowhere.json"}, "/nowhere.json"),
    ],
)
def test_contradictions(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hicache.check(args(**changes))
    assert says in str(caught.value)


def test_a_small_ratio_is_fine_with_a_size() -> None:
    hicache.check(args(hicache_ratio=0.5, hicache_size=4))


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"x": 1}'), ("a.yaml", "x: 1")])
def test_extra_config_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert hicache.extra_config(args(hicache_storage_backend_extra_config=f"@{path}")) == {"x": 1}
