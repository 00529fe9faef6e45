"""Which file serves which checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from checkpoints import read_config

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.models import llama
from moonlang.models.registry import spec_for, specs


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(llama.tiny()))
    return read_config(tmp_path)


@pytest.mark.parametrize("impl", ["auto", "moonlang", "sglang"])
def test_own_file(config: ModelConfig, impl: str) -> None:
    assert spec_for(config, impl) is llama.SPEC


def test_the_first_known_architecture_counts(config: ModelConfig) -> None:
    config = dataclasses.replace(config, architectures=("NovelForCausalLM", "LlamaForCausalLM"))
    assert spec_for(config) is llama.SPEC


def test_no_own_file(config: ModelConfig) -> None:
    config = dataclasses.replace(config, architectures=("NovelForCausalLM",))
    with pytest.raises(ConfigError, match=r"NovelForCausalLM.*--model-impl auto"):
        spec_for(config, "moonlang")
    with pytest.raises(ConfigError, match="'mindspore'"):
        spec_for(config, "mindspore")


def test_every_file_names_its_architectures() -> None:
    for name, spec in specs().items():
        assert spec.architectures, name
        assert spec.tiny()["architectures"][0] in spec.architectures


def test_kv_schema(config: ModelConfig) -> None:
    schema = llama.SPEC.kv_schema(config, 16, "abc")
    assert (schema.num_layers, schema.num_kv_heads, schema.head_dim) == (3, 2, 16)
    assert (schema.page_size, schema.dtype, schema.itemsize, schema.fingerprint) == (16, "float32", 4, "abc")
    assert schema.page_bytes == 2 * 3 * 2 * 16 * 16 * 4
