"""Quantised checkpoints, made here by the definition of their formats, against the float model they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
import torch
from checkpoints import read_config, write_checkpoint
from packers import FORMATS, FP8, GPTQ, write_mxfp4, write_packed, write_packed_experts
from paged_driver import PagedDriver
from torch import nn

from moonlang.base.errors import ConfigError
from moonlang.config.host import cpu_kernels
from moonlang.model_loader import fingerprint, load_model
from moonlang.models.registry import spec_for, specs

PROMPT = [(7 * i + 3) % 256 for i in range(40)]
TOLERANCE = 1e-4


def config_of(**changes: Any) -> dict[str, Any]:
    """A Llama whose matrices end within a block of 128, with two query heads per key head."""
    return specs()["llama"].tiny() | {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16} | changes


def logits_of(folder: Path, kernels: bool = False, **args: Any) -> tuple[list[int], torch.Tensor]:
    """The tokens and the log probabilities of all positions, from chunks of 16, by torch or the kernels."""
    config = read_config(folder, **args)
    spec = spec_for(config, "moonlang")
    if kernels:
        from program_driver import ProgramDriver  # imports sgl_kernel

        driver = ProgramDriver(config, spec, 8, 64)
    else:
        driver = PagedDriver(load_model(config, spec), spec.kv_schema(config, 8), 64)
    sequence = driver.sequence(PROMPT)
    driver.generate([sequence], 16, 6)
    return sequence.tokens, torch.stack(sequence.logits).log_softmax(-1)


def expect(model: nn.Module, tokens: list[int], logits: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance)
    assert tokens[len(PROMPT) :] == wanted[len(PROMPT) - 1 :].argmax(-1).tolist()


WITH_KERNELS = [False, pytest.param(True, marks=pytest.mark.skipif(not cpu_kernels(), reason="no sgl-kernel"))]


@pytest.mark.parametrize("kernels", WITH_KERNELS, ids=["torch", "kernels"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_quantized_checkpoint_is_the_float_model_it_stands_for(form: str, kernels: bool, tmp_path: Path) -> None:
    settings, pack = FORMATS[form]
    model = write_packed(tmp_path, config_of(), settings, pack)
    expect(model, *logits_of(tmp_path, kernels))


def test_zero_biases_of_gptq_files_are_not_in_the_way(tmp_path: Path) -> None:
    def pack(weight: np.ndarray) -> packers.Packed:
        tensors, exact = packers.gptq(weight)
        return tensors | {"bias": torch.zeros(len(weight))}, exact

    model = write_packed(tmp_path, config_of(attention_bias=False, mlp_bias=False), GPTQ, pack)
    expect(model, *logits_of(tmp_path))


def test_parts_of_a_fused_projection_may_stay_floats(tmp_path: Path) -> None:
    count = iter(range(1000))

    def pack(weight: np.ndarray) -> packers.Packed:
        return packers.fp8(weight) if next(count) % 2 else ({"weight": torch.from_numpy(weight.copy())}, weight)

    model = write_packed(tmp_path, config_of(), FP8, pack)
    expect(model, *logits_of(tmp_path))


def test_experts(tmp_path: Path) -> None:
    plain = write_packed_experts(tmp_path, specs()["qwen3_moe"].tiny(), GPTQ, packers.gptq)
    expect(plain, *logits_of(tmp_path))


@pytest.mark.parametrize("kernels", WITH_KERNELS, ids=["torch", "kernels"])
def test_gpt_oss_in_mxfp4(kernels: bool, tmp_path: Path) -> None:
    plain = write_mxfp4(tmp_path, specs()["gpt_oss"].tiny())
    expect(plain, *logits_of(tmp_path, kernels))


@pytest.mark.parametrize("kernels", WITH_KERNELS, ids=["torch", "kernels"])
def test_deepseek_in_fp8_blocks(kernels: bool, tmp_path: Path) -> None:
    """As DeepSeek publishes V3: every projection, kv_b_proj and the experts too, in blocks of 128 x 128; the router,
    its correction and the norms in floats; and behind the last layer one that predicts more tokens at a time."""
    config = specs()["deepseek_v3"].tiny() | {"hidden_size": 160, "moe_intermediate_size": 144, "kv_lora_rank": 144}
    settings, pack = FORMATS["fp8-block"]
    extra = f"model.layers.{config['num_hidden_layers']}"
    packed, _ = pack(np.ones((160, 320), np.float32))
    beyond = {f"{extra}.eh_proj.{ending}": tensor for ending, tensor in packed.items()}
    beyond |= {f"{extra}.enorm.weight": torch.ones(160), f"{extra}.shared_head.head.weight": torch.ones(256, 160)}
    plain = write_packed_experts(tmp_path, config | {"num_nextn_predict_layers": 1}, settings, pack, beyond)
    expect(plain, *logits_of(tmp_path, kernels))


@pytest.mark.parametrize("kernels", WITH_KERNELS, ids=["torch", "kernels"])
@pytest.mark.parametrize(("method", "error"), [("int8", 0.08), ("fp8", 0.3), ("w8a8_int8", 0.12), ("int4", 0.9)])
def test_float_checkpoints_are_quantized_while_loading(
    method: str, error: float, kernels: bool, tmp_path: Path
) -> None:
    """error: the largest mean absolute difference of log probabilities; random weights are the worst case."""
    model = write_packed(tmp_path, config_of(hidden_size=256, intermediate_size=320), None, None)
    tokens, logits = logits_of(tmp_path, kernels, quantization=method)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    difference = (logits - wanted).abs().mean()
    assert 1e-4 < difference < error


@pytest.mark.skipif(not cpu_kernels(), reason="no sgl-kernel")
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_both_paths_quantize_the_same_weights(name: str, tmp_path: Path) -> None:
    """Experts of one tensor too; but neither routers nor kv_b_proj, which is multiplied from both sides."""
    model = write_checkpoint(tmp_path, specs()[name].tiny())
    (tokens, ours), (_, theirs) = (logits_of(tmp_path, kernels, quantization="int8") for kernels in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    assert 1e-3 < (ours - wanted).abs().mean() < 0.1


def test_pages_of_differently_quantized_weights_are_told_apart(tmp_path: Path) -> None:
    write_packed(tmp_path, config_of(), None, None)
    names = {fingerprint(read_config(tmp_path, quantization=method)) for method in (None, "int8", "int4", "fp8")}
    assert len(names) == 4


def test_tensors_that_do_not_fit_their_format(tmp_path: Path) -> None:
    def pack(weight: np.ndarray) -> packers.Packed:
        tensors, exact = packers.gptq(weight)
        return tensors | {"g_idx": torch.zeros(weight.shape[1], dtype=torch.int32)}, exact

    write_packed(tmp_path, config_of(), GPTQ, pack)
    with pytest.raises(ConfigError, match=r"no gptq matrix: g_idx"):
        logits_of(tmp_path)
