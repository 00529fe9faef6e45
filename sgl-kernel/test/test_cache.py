"""Packed weights on disk: found again, never wrong, never too many."""

import os
from pathlib import Path

import pytest
import sgl_kernel as kernels
import torch
from sgl_kernel.cache import PackedCache, Unkept

pytestmark = pytest.mark.parametrize("isa", ["generic"], indirect=True)  # the layout is the same for all

KEY, OTHER = "ab" * 32, "cd" * 32


def never(arena):
    raise AssertionError("packed again")


def quantized(kind: str, n: int, k: int, *, group: int, zeros: bool = False, ordered: bool = False):
    groups = -(-k // group)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    if kind.startswith("fp8"):
        codes = codes.to(torch.float8_e4m3fn if kind == "fp8_e4m3" else torch.float8_e5m2)
    return lambda arena: kernels.pack_quantized(
        [codes],
        [torch.rand(n, groups)],
        [torch.randint(-4, 4, (n, groups)).float()] if zeros else None,
        kind=kind,
        group=group,
        order=torch.randperm(k).int() if ordered else None,
        gated=n % 2 == 0,
        arena=arena,
    )


def packers() -> list:
    """One weight of every form."""
    dense = torch.randn(80, 33)
    return [
        lambda arena: kernels.pack(dense, kind="bf16", arena=arena),
        lambda arena: kernels.pack([dense[:40], dense[40:]], kind="f32", gated=True, arena=arena),
        quantized("int8", 40, 100, group=100),
        quantized("int4", 33, 384, group=256, zeros=True, ordered=True),
        quantized("int4", 33, 70, group=32),
        quantized("w8a8", 40, 70, group=70),
        quantized("fp8_e4m3", 31, 300, group=128),
        quantized("fp8_e5m2", 32, 64, group=64),
    ]


def load(cache: PackedCache, packs: list, key: str = KEY) -> list:
    with cache.open(key) as packed:
        return [packed.weight(pack) for pack in packs]


def product(weight) -> torch.Tensor:
    torch.manual_seed(weight.k)
    x, y = torch.randn(3, weight.k), torch.empty(3, weight.columns)
    kernels.gemm(weight, x, y, act="silu" if weight.gated else "none")
    return y


def same(a, b) -> bool:
    described = [(w.n, w.k, w.kind, w.gated, w.bytes, bytes(w.memory())) for w in (a, b)]
    return described[0] == described[1] and torch.equal(product(a), product(b))


def packed_files(cache: PackedCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(str(tmp_path / "packed"), 1 << 30)


def test_the_second_time_comes_from_the_folder(cache):
    made = load(cache, packers())
    found = load(cache, [never] * len(made))
    assert all(same(a, b) for a, b in zip(made, found, strict=True))
    assert packed_files(cache) == [f"{KEY}.packed"]


def test_weights_on_small_pages_are_copied(cache, monkeypatch):
    made = load(cache, packers())
    monkeypatch.setattr("sgl_kernel.cache._on_huge_pages", lambda file: False)
    found = load(cache, [never] * len(made))
    (cache.folder / f"{KEY}.packed").write_bytes(b"")  # a mapping would see this
    assert all(same(a, b) for a, b in zip(made, found, strict=True))


def test_mapped_weights_outlive_their_file(cache):
    (made,) = load(cache, packers()[:1])
    (found,) = load(cache, [never])
    (cache.folder / f"{KEY}.packed").unlink()
    assert same(made, found)


def test_large_weights_are_written_whole(cache):
    weight = torch.randn(1111, 1023)  # 2.3 MB, so that pieces of 2 MB end inside weights
    packs = [lambda arena: kernels.pack(weight, kind="bf16", arena=arena)] * 3
    made = load(cache, packs)
    assert all(same(a, b) for a, b in zip(made, load(cache, [never] * 3), strict=True))


@pytest.mark.parametrize("damage", ["weight", "header", "table", "cut", "empty", "junk"])
def test_a_damaged_file_is_packed_anew(cache, damage):
    (made,) = load(cache, packers()[:1])
    path = cache.folder / f"{KEY}.packed"
    content = bytearray(path.read_bytes())
    content[{"header": 3, "table": len(content) - 5}.get(damage, 1000)] ^= 1
    path.write_bytes({"cut": content[:500], "empty": b"", "junk": os.urandom(5000)}.get(damage, content))
    repacked = load(cache, [lambda arena: kernels.pack(torch.ones(2, 2), kind="f32", arena=arena)])
    assert repacked[0].n == 2
    assert load(cache, [never])[0].n == 2
    assert made.n == 80


def test_a_file_under_the_name_of_another_is_not_used(cache):
    load(cache, packers()[:1])
    (cache.folder / f"{KEY}.packed").rename(cache.folder / f"{OTHER}.packed")
    weights = load(cache, [lambda arena: kernels.pack(torch.ones(2, 2), arena=arena)], OTHER)
    assert weights[0].n == 2


def test_what_failed_or_is_not_confirmed_is_not_kept(cache):
    packs = packers()[:1]
    with pytest.raises(AssertionError, match="packed again"):
        load(cache, [*packs, never])
    with cache.open(KEY, confirm=lambda: False) as packed:
        packed.weight(packers()[0])
    assert packed_files(cache) == []


def test_the_folder_stays_within_its_bound(tmp_path):
    weight = torch.randn(64, 64)
    pack = lambda arena: kernels.pack(weight, arena=arena)  # noqa: E731
    keys = [f"{i:064x}" for i in range(6)]
    unbounded = PackedCache(str(tmp_path), 1 << 30)
    load(unbounded, [pack], keys[0])
    size = (tmp_path / f"{keys[0]}.packed").stat().st_size
    cache = PackedCache(str(tmp_path), 3 * size)
    for age, key in enumerate(keys[:3]):
        load(cache, [pack if age else never], key)
        os.utime(tmp_path / f"{key}.packed", (age, age))
    load(cache, [never], keys[0])  # used now: the second is the oldest
    load(cache, [pack], keys[3])
    assert packed_files(cache) == sorted(f"{keys[i]}.packed" for i in (0, 2, 3))
    load(PackedCache(str(tmp_path), size - 1), [pack], keys[4])  # larger than the whole bound: not kept
    assert packed_files(cache) == sorted(f"{keys[i]}.packed" for i in (0, 2, 3))


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("")
    cache = PackedCache(str(tmp_path / "file" / "folder"))
    packs = packers()[:1]
    made = load(cache, packs)
    assert same(made[0], Unkept().weight(packs[0]))


def test_the_environment_names_folder_and_bound(monkeypatch, tmp_path):
    monkeypatch.setenv("MOONLANG_PACKED_CACHE", str(tmp_path))
    monkeypatch.setenv("MOONLANG_PACKED_CACHE_GB", "0.5")
    assert PackedCache().folder == tmp_path
    assert PackedCache().limit_bytes == 500_000_000
