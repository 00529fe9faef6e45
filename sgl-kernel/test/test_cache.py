"""Packed weights on disk: found again, never wrong, never too many."""

import os

import pytest
import sgl_kernel as kernels
import torch
from sgl_kernel.cache import PackedCache, content_key

pytestmark = pytest.mark.parametrize("isa", ["generic"], indirect=True)  # the layout is the same for all


@pytest.fixture
def cache(tmp_path):
    return PackedCache(str(tmp_path / "packed"), 1 << 20)


def files(cache: PackedCache) -> list[str]:
    return sorted(os.listdir(cache.folder)) if cache.folder.exists() else []


def same(a, b) -> bool:
    return (a.n, a.k, a.kind, a.gated) == (b.n, b.k, b.kind, b.gated) and bytes(a.memory()) == bytes(b.memory())


@pytest.mark.parametrize(("kind", "gated"), [("bf16", False), ("f32", True)])
def test_the_second_time_comes_from_the_folder(cache, monkeypatch, kind, gated):
    gate, up = torch.randn(40, 33), torch.randn(40, 33)
    expected = kernels.pack([gate, up], kind=kind, gated=gated)
    assert same(cache.pack([gate, up], kind=kind, gated=gated), expected)
    assert len(files(cache)) == 1
    monkeypatch.setattr("sgl_kernel._C.pack", None)  # packing again would raise
    assert same(cache.pack([gate.clone(), up.clone()], kind=kind, gated=gated), expected)


def test_the_key_changes_with_everything_that_matters():
    weight = torch.randn(8, 6)
    changed = weight.clone()
    changed[7, 5] += 1
    keys = [
        content_key([weight], "bf16", False),
        content_key([weight], "f32", False),
        content_key([weight], "bf16", True),
        content_key([changed], "bf16", False),
        content_key([weight[:7]], "bf16", False),
        content_key([weight.view(6, 8)], "bf16", False),
        content_key([weight[:4], weight[4:]], "bf16", False),
        content_key([weight[4:], weight[:4]], "bf16", False),
        content_key([weight.view(torch.int32)], "bf16", False),
    ]
    assert len(set(keys)) == len(keys)
    wide = torch.zeros(8, 10)
    wide[:, 2:8] = weight
    assert content_key([wide[:, 2:8]], "bf16", False) == keys[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header"])
def test_a_damaged_file_is_packed_anew(cache, damage):
    weight = torch.randn(64, 64)
    expected = cache.pack(weight)
    path = cache.folder / files(cache)[0]
    content = bytearray(path.read_bytes())
    content[{"header": 3}.get(damage, 1000)] ^= 1
    path.write_bytes({"cut": content[:500], "empty": b""}.get(damage, content))
    assert same(cache.pack(weight), expected)
    assert same(cache.pack(weight), expected)
    assert path.stat().st_size == expected.bytes + 64


def test_the_folder_stays_within_its_bound(tmp_path):
    weights = [torch.randn(64, 64) for _ in range(6)]
    size = kernels.pack(weights[0]).bytes + 64
    cache = PackedCache(str(tmp_path), 3 * size)
    for age, weight in enumerate(weights[:3]):
        cache.pack(weight)
        (path,) = [cache.folder / name for name in files(cache) if content_key([weight], "bf16", False) in name]
        os.utime(path, (age, age))
    cache.pack(weights[0])  # used now: the second is the oldest
    cache.pack(weights[3])
    assert len(files(cache)) == 3
    kept = [any(content_key([w], "bf16", False) in name for name in files(cache)) for w in weights[:4]]
    assert kept == [True, False, True, True]
    PackedCache(str(tmp_path), size - 1).pack(weights[5])  # larger than the whole bound: not kept
    assert len(files(cache)) == 3


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("")
    weight = torch.randn(8, 8)
    assert same(PackedCache(str(tmp_path / "file" / "folder")).pack(weight), kernels.pack(weight))


def test_the_environment_names_folder_and_bound(monkeypatch, tmp_path):
    monkeypatch.setenv("MOONLANG_PACKED_CACHE", str(tmp_path))
    monkeypatch.setenv("MOONLANG_PACKED_CACHE_GB", "0.5")
    assert PackedCache().folder == tmp_path
    assert PackedCache().limit_bytes == 500_000_000
