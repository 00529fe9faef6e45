"""A second start takes the packed weights of the first: the same program without reading the checkpoint's matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import read_config, write_checkpoint

from moonlang.models.registry import spec_for, specs

pytest.importorskip("sgl_kernel")

from sgl_kernel.cache import PackedCache, Unkept

from moonlang.kernels.program import Builder
from moonlang.model_loader import open_model
from moonlang.model_loader.packed import packed_weights


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_checkpoint(path, specs()[request.param].tiny())
    return path


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(str(tmp_path), 1 << 30)


def start(folder: Path, cache: PackedCache, monkeypatch: pytest.MonkeyPatch, **args: object) -> tuple[int, list[bytes]]:
    """How many matrices were read from the checkpoint, and the bytes of all packed weights."""
    config = read_config(folder, "bfloat16", **args)
    model, parts = open_model(config, spec_for(config, "moonlang"))
    read = 0
    matrices = type(parts).matrices

    def counted(self: object, parameter: object) -> object:
        nonlocal read
        read += 1
        return matrices(self, parameter)  # type: ignore[arg-type]

    monkeypatch.setattr(type(parts), "matrices", counted)
    weights = []
    with packed_weights(config, "auto", cache, worth_bytes=0) as packed:
        build = Builder(config.dtype, parts, packed)
        pack = build._packed.weight
        monkeypatch.setattr(build._packed, "weight", lambda make: weights.append(pack(make)) or weights[-1])
        model.lower(build)
    monkeypatch.undo()
    return read, [bytes(weight.memory()) for weight in weights]


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_the_second_start_reads_no_matrix(folder, cache, monkeypatch, quantization):
    first, made = start(folder, cache, monkeypatch, quantization=quantization)
    second, found = start(folder, cache, monkeypatch, quantization=quantization)
    assert first > 0
    assert second == 0
    assert found == made


def test_what_decides_the_bytes_decides_the_key(folder, cache, monkeypatch):
    _, floats = start(folder, cache, monkeypatch)
    read, codes = start(folder, cache, monkeypatch, quantization="int8")
    assert read > 0
    assert codes != floats
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    read, _ = start(folder, cache, monkeypatch)
    assert read > 0


def test_small_and_random_weights_are_not_kept(folder, cache):
    config = read_config(folder, "bfloat16")
    assert type(packed_weights(config, "auto", cache)) is Unkept
    assert type(packed_weights(config, "dummy", cache, worth_bytes=0)) is Unkept
    nothing = PackedCache(str(cache.folder), 0)
    assert type(packed_weights(config, "auto", nothing, worth_bytes=0)) is Unkept
