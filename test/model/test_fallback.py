"""Models of transformers without a file of their own: token-exact through our pages, or refused with a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_config, write_checkpoint
from paged_driver import PagedDriver
from safetensors.torch import load_file, save_file
from torch import nn

from moonlang.base.errors import ConfigError
from moonlang.model_loader import fingerprint, load_model
from moonlang.models.registry import spec_for, specs
from moonlang.models.transformers import SPEC

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmo2": SPEC.tiny(),
    "llama": specs()["llama"].tiny(),
    "gemma2": specs()["gemma2"].tiny(),
    "phi3": SMALL | {"model_type": "phi3", "num_key_value_heads": 2, "sliding_window": 16},
    "stablelm": SMALL | {"model_type": "stablelm", "num_key_value_heads": 4, "use_qkv_bias": True},
    "gpt_neox": SMALL | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "cohere2": SMALL | {"model_type": "cohere2", "num_key_value_heads": 2, "sliding_window": 12, "logit_scale": 0.3},
    "granite": SMALL | {"model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 4.0},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 256,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "eos_token_id": 1,
    },
    "qwen3_moe": SMALL
    | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def load(folder: Path, page_size: int) -> tuple[nn.Module, Any]:
    config = read_config(folder)
    spec = spec_for(config, "transformers")
    return load_model(config, spec), spec.kv_schema(config, page_size, fingerprint(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_token_exact_over_chunks_batches_and_shared_pages(name: str, tmp_path: Path) -> None:
    config = {"architectures": [name], **CONFIGS[name]}
    reference = write_checkpoint(tmp_path, config)
    model, schema = load(tmp_path, 4)
    driver = PagedDriver(model, schema, 64)
    rng = random.Random(1)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 18, 33)]
    sequences = [driver.sequence(prompt) for prompt in prompts]
    driver.forward([(sequences[0], 1), (sequences[1], 7), (sequences[2], 20)])
    driver.forward([(sequences[0], 1), (sequences[1], 11), (sequences[2], 13)])
    twin = driver.sequence([*prompts[2][:24], 5, 6, 7], prefix_of=sequences[2])
    driver.forward([(sequences[0], 1), (sequences[1], 1), (sequences[2], 1), (twin, len(twin.tokens) - twin.computed)])
    for _ in range(4):
        driver.forward([(sequence, 1) for sequence in (*sequences, twin)])
    for sequence in (*sequences, twin):
        with torch.inference_mode():
            expected = reference(torch.tensor([sequence.tokens[:-1]])).logits[0].float()
        got = torch.stack(sequence.logits)
        assert (got.log_softmax(-1) - expected[sequence.first :].log_softmax(-1)).abs().max() < 1e-4
        assert sequence.tokens[sequence.prompt :] == expected[sequence.prompt - 1 :].argmax(-1).tolist()


def test_dummy_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["olmo2"])
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    config = read_config(tmp_path)
    assert sum(p.numel() for p in load_model(config, spec_for(config, "auto"), "dummy").parameters()) > 10_000


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SMALL | {"model_type": "bloom", "n_head": 4, "n_layer": 2}, "fallback cannot serve this model|cannot load"),
        (SMALL | {"model_type": "mamba", "state_size": 4}, "fallback cannot serve this model|cannot load"),
        (
            SMALL
            | {
                "model_type": "gpt_oss",
                "head_dim": 16,
                "num_key_value_heads": 2,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
            },
            "its attention uses s_aux",
        ),
        (SMALL | {"model_type": "never-heard-of"}, "does not know model type 'never-heard-of'"),
        (
            SMALL | {"model_type": "stablelm", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "--context-length 512",
        ),
    ],
    ids=["bloom", "mamba", "sinks", "unknown", "dynamic-rope"],
)
def test_what_cannot_be_served_is_refused_with_a_reason(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"], "torch_dtype": "float32"} | config))
    ours = read_config(tmp_path, context_length=1024) if "rope_scaling" in config else read_config(tmp_path)
    with pytest.raises(ConfigError, match=words):
        load_model(ours, spec_for(ours, "auto"), "dummy")


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SPEC.tiny()))
    config = read_config(tmp_path)
    with pytest.raises(ConfigError, match="with its weights in safetensors files"):
        load_model(config, spec_for(config, "auto"))


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIGS["olmo2"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = read_config(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 1 tensors, for instance model\.layers\.1\.mlp\.up_proj"):
        load_model(config, spec_for(config, "auto"))
