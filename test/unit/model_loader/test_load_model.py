"""Loading: whole and sharded files give the same model, and what is wrong with a folder is said by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load, read_config, write_checkpoint
from packers import write_mxfp4
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moonlang.base.errors import ConfigError
from moonlang.model_loader import fingerprint
from moonlang.models.registry import specs

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, specs()["llama"].tiny())
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> list[str]:
    """Split the file in three, as the hub does; returns the names of the shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: names[i % 3] for i, name in enumerate(tensors)}
    for shard_name in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard_name}, folder / shard_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def test_fused_weights_are_the_tensors_one_after_the_other(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    model, _, config = load(original)
    prefix = "model.layers.2.self_attn."
    fused = torch.cat([tensors[f"{prefix}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(parameters(model)[f"{prefix}qkv_proj.weight"], fused)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert config.dtype == "float32"


def test_sharded_is_the_same_model(folder: Path, original: Path) -> None:
    shard(folder)
    ours, whole = parameters(load(folder)[0]), parameters(load(original)[0])
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_dtype_converts(original: Path) -> None:
    full, half = parameters(load(original)[0]), parameters(load(original, "bfloat16")[0])
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(QUERY), rf"1 missing: {QUERY}"),
        (lambda t: t.pop("lm_head.weight"), r"1 missing: lm_head.weight.*tie_word_embeddings"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "1 unexpected: model.extra.weight"),
        (lambda t: t.update({DOWN: torch.ones(64, 99)}), rf"1 of another shape: {DOWN} is \(64, 99\).*\(64, 128\)"),
        (lambda t: t.update({QUERY: torch.ones(64, 32)}), rf"1 of another shape: {QUERY} \+ .*\(64, 32\)"),
        (lambda t: t.update({DOWN: torch.ones(64, 128, dtype=torch.int8)}), rf"1 not floating point: {DOWN} \(I8\)"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, change: Callable[[dict[str, Tensor]], object], says: str) -> None:
    edit(folder, change)
    with pytest.raises(ConfigError, match=says):
        load(folder)


def test_harmless_extras_are_passed_over(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(folder)


def test_a_file_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors \(\d+ bytes\) cannot be read.*cut short"):
        load(folder)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="cut short"):
        load(folder)
    with pytest.raises(ConfigError, match="cut short: 50 bytes"):
        fingerprint(read_config(folder))


def test_a_shard_that_is_not_there(folder: Path) -> None:
    names = shard(folder)
    (folder / names[1]).unlink()
    with pytest.raises(ConfigError, match=f"1 of 3 weight files are missing: {names[1]}"):
        load(folder)


def test_a_broken_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ConfigError, match="not a valid index"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"No \*.safetensors.*can run code"):
        load(folder)


def test_stacked_experts_without_their_scales(tmp_path: Path) -> None:
    write_mxfp4(tmp_path, specs()["gpt_oss"].tiny())
    name = "model.layers.1.mlp.experts.down_proj"
    for change, says in (
        (lambda t: t.update({f"{name}_scales": t[f"{name}_scales"][:, :8].contiguous()}), r"no MXFP4: scales of shape"),
        (lambda t: t.pop(f"{name}_scales"), f"{name}_blocks has no scales"),
    ):
        edit(tmp_path, change)
        with pytest.raises(ConfigError, match=says):
            load(tmp_path)


def test_an_unknown_load_format(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gguf'.*dummy, safetensors"):
        load(folder, load_format="gguf")


@pytest.mark.parametrize("name", specs())
def test_dummy_weights_are_the_same_every_time(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(specs()[name].tiny()))
    first, second = (parameters(load(tmp_path, load_format="dummy")[0]) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.isfinite(value).all() for value in first.values())
    assert not torch.equal(*(first[f"model.layers.{i}.self_attn.o_proj.weight"] for i in (0, 1)))


def test_a_fingerprint_names_the_numbers_and_not_the_place(folder: Path, original: Path) -> None:
    def of(path: Path, dtype: str = "float32") -> str:
        return fingerprint(read_config(path, dtype))

    assert of(folder) == of(original)
    assert of(original, "bfloat16") != of(original)
    assert fingerprint(read_config(original), "dummy", 1) != fingerprint(read_config(original), "dummy", 2)
    edit(folder, lambda t: t[DOWN].add_(1))
    assert of(folder) != of(original)
