"""Every model file against `transformers`, in float32: the same greedy tokens, log probabilities within 1e-4.

The references are random checkpoints of the model's own `tiny` configuration. Each is run through mixed batches with
chunked prefill and shared prefix pages; then transformers computes the whole sequence in one forward.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_driver import PagedDriver, Sequence
from transformers import AutoConfig, AutoModelForCausalLM

from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs
from moonlang.core.kv import KvSchema
from moonlang.model_loader import load_model
from moonlang.models.registry import spec_for, specs

TOLERANCE = 1e-4
NEW_TOKENS = 6

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in specs()},
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}}),
    "llama-tied-no-gqa": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": False}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
}


def write_checkpoint(folder: Path, config: dict[str, Any], **save: Any) -> torch.nn.Module:
    """A random float32 checkpoint with `config` as its config.json; returns the transformers model."""
    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields)))
    )
    reference = reference.float().eval()
    with torch.no_grad():
        for (
            parameter
        ) in reference.parameters():  # norms start as ones, biases as zeros: give all of them a part to play
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    reference.save_pretrained(folder, **save)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return reference


def load(folder: Path, page_size: int) -> tuple[torch.nn.Module, KvSchema]:
    config = load_model_config(str(folder), ServerArgs.create(model_path=str(folder), dtype="float32"))
    spec = spec_for(config, "moonlang")
    return load_model(config, spec), spec.kv_schema(config, page_size)


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path]:
    name, changes = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(folder, specs()[name].tiny() | changes), folder


def check(reference: torch.nn.Module, sequence: Sequence) -> None:
    """Compare every computed position with one forward of transformers, and every generated token with its argmax."""
    with torch.inference_mode():
        expected = reference(torch.tensor([sequence.tokens[:-1]])).logits[0].float()
    got = torch.stack(sequence.logits)
    assert len(got) == sequence.computed - sequence.first == len(expected) - sequence.first
    difference = (got.log_softmax(-1) - expected[sequence.first :].log_softmax(-1)).abs().max().item()
    assert difference <= TOLERANCE, f"log probabilities differ by {difference}"
    assert sequence.tokens[sequence.prompt :] == expected[sequence.prompt - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize(("chunk", "page_size"), [(1, 1), (7, 4), (16, 16), (1000, 64), (1000, 1)])
def test_same_as_transformers(checkpoint: tuple[torch.nn.Module, Path], chunk: int, page_size: int) -> None:
    reference, folder = checkpoint
    model, schema = load(folder, page_size)
    driver = PagedDriver(model, schema, num_pages=800 // page_size + 20)
    words = random.Random(page_size)
    prompts = [[words.randrange(256) for _ in range(length)] for length in (1, 5, 17, 32, 66, 90)]
    first = [driver.sequence(prompt) for prompt in prompts]
    driver.generate(first, chunk, NEW_TOKENS)
    follow_ups = [s.tokens + [words.randrange(256) for _ in range(9)] for s in first]
    second = [driver.sequence(tokens, prefix_of=s) for tokens, s in zip(follow_ups, first, strict=True)]
    assert page_size == 64 or sum(s.first for s in second) > 100
    driver.generate([*second, driver.sequence(prompts[3])], chunk, NEW_TOKENS)
    for sequence in (*first, *second):
        check(reference, sequence)
