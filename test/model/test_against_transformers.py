"""Every model file against `transformers`, in float32: the same greedy tokens, log probabilities within 2e-4.

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
from checkpoints import load, read_config, reference_model, write_checkpoint
from paged_driver import PagedDriver, Sequence
from torch import nn

from moonlang.config.host import cpu_kernels
from moonlang.models.registry import spec_for, specs

TOLERANCE = 4e-4  # float32 sums of up to 1,024 numbers in another order than torch takes
NEW_TOKENS = 6

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN_MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16, "beta_slow": 2}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
QWEN_KINDS = ["full_attention", "sliding_attention", "full_attention"]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in specs()},
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN_MSCALE | {"rope_theta": 5000.0}}),
    "llama-tied-no-gqa": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": False}),
    "llama-rows-of-4-KB": ("llama", {"hidden_size": 1024, "num_hidden_layers": 1}),  # the program sets them apart
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-full": ("qwen2", {"use_sliding_window": False}),
    "qwen3-layer-types": ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": QWEN_KINDS}),
    "qwen3_moe-raw-sparse": ("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    "qwen2_moe-all": ("qwen2_moe", {"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1}),
    "deepseek_v2-lite": ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    "deepseek_v2-yarn": ("deepseek_v2", {"rope_scaling": YARN_MSCALE, "q_lora_rank": 40, "first_k_dense_replace": 0}),
    "deepseek_v3-plain": ("deepseek_v3", {"rope_scaling": None, "q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3-new-rope": ("gemma3", {"rope_parameters": GEMMA3_ROPE, "rope_scaling": None}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    name, changes = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(folder, specs()[name].tiny() | changes), folder


@pytest.fixture(params=["torch", "program"])
def path(request: pytest.FixtureRequest) -> str:
    """What computes the model: modules of torch, or the program of the CPU kernels."""
    if request.param == "program" and not cpu_kernels():
        pytest.skip("sgl-kernel is not installed")
    return request.param


def driver_for(folder: Path, page_size: int, dtype: str = "float32", path: str = "torch") -> PagedDriver:
    pages = 1200 // page_size + 20
    if path == "program":
        from program_driver import ProgramDriver

        config = read_config(folder, dtype)
        return ProgramDriver(config, spec_for(config), page_size, pages)
    model, spec, config = load(folder, dtype)
    return PagedDriver(model, spec.kv_schema(config, page_size), pages)


def check(reference: nn.Module, sequence: Sequence) -> None:
    """Compare every computed position with one forward of transformers, and every generated token with its argmax."""
    with torch.inference_mode():
        expected = reference(torch.tensor([sequence.tokens[:-1]])).logits[0].float()
    got = torch.stack(sequence.logits)
    assert len(got) == sequence.computed - sequence.first == len(expected) - sequence.first
    difference = (got.log_softmax(-1) - expected[sequence.first :].log_softmax(-1)).abs().max().item()
    assert difference <= TOLERANCE, f"log probabilities differ by {difference}"
    assert sequence.tokens[sequence.prompt :] == expected[sequence.prompt - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize(("chunk", "page_size"), [(1, 1), (7, 4), (16, 16), (1000, 64), (1000, 1)])
def test_same_as_transformers(checkpoint: tuple[nn.Module, Path], chunk: int, page_size: int, path: str) -> None:
    reference, folder = checkpoint
    driver = driver_for(folder, page_size, path=path)
    words = random.Random(page_size)
    prompts = [[words.randrange(256) for _ in range(length)] for length in (1, 5, 17, 32, 66, 90)]
    first = [driver.sequence(prompt) for prompt in prompts]
    driver.generate(first, chunk, NEW_TOKENS)
    follow_ups = [s.tokens + [words.randrange(256) for _ in range(9)] for s in first]
    second = [driver.sequence(tokens, prefix_of=s) for tokens, s in zip(follow_ups, first, strict=True)]
    assert sum(s.first for s in second) >= 64, "no prefix was shared"
    driver.generate([*second, driver.sequence(prompts[3])], chunk, NEW_TOKENS)
    for sequence in (*first, *second):
        check(reference, sequence)


def test_dynamic_rope_past_its_trained_length(tmp_path: Path, path: str) -> None:
    """Token by token transformers grows theta with the position; here that holds for any chunking."""
    config = specs()["llama"].tiny() | {"max_position_embeddings": 24}
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 4.0}
    reference = write_checkpoint(tmp_path, config)
    tokens = [random.Random(1).randrange(256) for _ in range(60)]
    with torch.inference_mode():
        past, expected = None, []
        for token in tokens:
            out = reference(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            expected.append(out.logits[0, -1])
    for chunk in (7, 60):
        driver = driver_for(tmp_path, 8, path=path)
        sequence = driver.sequence(tokens)
        driver.generate([sequence], chunk, 1)
        got = torch.stack(sequence.logits).log_softmax(-1)
        torch.testing.assert_close(got, torch.stack(expected).log_softmax(-1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", specs())
def test_the_spelling_of_new_and_old_config_files(name: str, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters`, `dtype` and `layer_types`; older files had other names for them."""
    config = specs()[name].tiny()
    reference = write_checkpoint(tmp_path, config)
    tokens = list(range(3, 40))
    outputs = []
    for written in (config, json.loads(json.dumps(reference.config.to_dict()))):
        (tmp_path / "config.json").write_text(json.dumps(written | {"architectures": config["architectures"]}))
        driver = driver_for(tmp_path, 16)
        sequence = driver.sequence(tokens)
        driver.generate([sequence], 1000, 2)
        check(reference, sequence)
        outputs.append(torch.stack(sequence.logits))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", specs())
def test_bfloat16_rounds_as_transformers_does(name: str, tmp_path: Path, path: str) -> None:
    """Half precision cannot agree to 1e-4; but it must be no further from float32 than transformers in bfloat16 is.

    At the median of positions: at a few of them rounding changes an expert, here or there.
    """
    exact = write_checkpoint(tmp_path, specs()[name].tiny())
    tokens = [random.Random(2).randrange(256) for _ in range(48)]
    with torch.inference_mode():
        expected = exact(torch.tensor([tokens])).logits[0].log_softmax(-1)
        theirs = exact.bfloat16()(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    driver = driver_for(tmp_path, 16, "bfloat16", path)
    sequence = driver.sequence(tokens)
    driver.generate([sequence], 20, 1)
    ours = torch.stack(sequence.logits).log_softmax(-1)
    own, other = ((found - expected).abs().mean(-1).median() for found in (ours, theirs))
    assert own <= 1.25 * other


def test_the_text_half_of_a_multimodal_gemma3(tmp_path: Path) -> None:
    """The tensors sit under other names, with the vision tower beside them; the sizes sit in `text_config`."""
    from safetensors.torch import save_file

    text = specs()["gemma3"].tiny()
    reference = reference_model(text)
    tensors = {
        f"language_model.{name}": value for name, value in reference.state_dict().items() if name != "lm_head.weight"
    }
    tensors |= {"vision_tower.patch.weight": torch.zeros(2), "multi_modal_projector.norm.weight": torch.zeros(2)}
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    driver = driver_for(tmp_path, 16)
    sequence = driver.sequence(list(range(40)))
    driver.generate([sequence], 16, 3)
    check(reference, sequence)
