"""Law 6 over ranks: 2 or 4 ranks that share a model compute the bits of one that has it whole.

Ranks are threads here; test/e2e/test_tensor_parallel.py has the processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from packers import FORMATS, write_packed, write_packed_experts
from rank_runners import answers, runner
from rank_threads import on_every_rank

from moonlang.config.host import cpu_kernels
from moonlang.models.registry import specs

CASES = [
    ("llama", "float32", 2),
    ("llama", "bfloat16", 4),  # two KV heads, each held by two ranks; biases
    ("qwen3", "bfloat16", 2),  # a head that is the embedding
    ("mixtral", "float32", 2),
    ("mixtral", "bfloat16", 4),  # one expert each
    ("qwen2_moe", "bfloat16", 2),  # an expert that every token visits
    ("gemma2", "bfloat16", 4),  # a bounded head
    ("deepseek_v2", "float32", 4),  # latents, which every rank has
    ("deepseek_v3", "bfloat16", 2),
    ("gpt_oss", "bfloat16", 4),  # sinks, and biases of experts
]

ACT_ORDER = {"gptq4-act-order", "gptq8-asymmetric"}


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(("name", "dtype", "size"), CASES, ids=str)
def test_the_same_bits(name: str, dtype: str, size: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, dtype, 0, 1))

    def work(rank: int) -> list[object]:
        mine = runner(tmp_path, dtype, rank, size)
        assert mine.computed_by.startswith("CPU kernels")
        heads = mine.regions[0].first_head, mine.schema.num_kv_heads
        assert heads == ((0, 1) if mine.schema.latent else ((rank * 2 // size), max(1, 2 // size)))
        return answers(mine)

    assert on_every_rank(size, work)[0] == alone


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v3"])
def test_the_torch_path(name: str, tmp_path: Path) -> None:
    """Without kernels sums over ranks are rounded otherwise; the tokens stay."""
    write_checkpoint(tmp_path, specs()[name].tiny())
    alone = answers(runner(tmp_path, "float32", 0, 1, "torch_native"))
    shared = on_every_rank(2, lambda rank: answers(runner(tmp_path, "float32", rank, 2, "torch_native")))[0]
    assert [job[0] for job in shared] == [job[0] for job in alone]  # type: ignore[index]


CUT = {"hidden_size": 64, "intermediate_size": 288, "head_dim": 32}  # segments that begin within groups


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(("form", "size"), [*((form, 2) for form in sorted(set(FORMATS) - ACT_ORDER)), ("awq", 4)])
def test_quantized_checkpoints(form: str, size: int, tmp_path: Path) -> None:
    settings, pack = FORMATS[form]
    write_packed(tmp_path, specs()["llama"].tiny() | CUT, settings, pack)
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))
    assert on_every_rank(size, lambda rank: answers(runner(tmp_path, "bfloat16", rank, size)))[0] == alone


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
def test_deepseek_in_fp8_blocks(tmp_path: Path) -> None:
    """kv_b_proj becomes floats on the way, and is cut as such."""
    settings, pack = FORMATS["fp8-block"]
    config = specs()["deepseek_v3"].tiny() | {"hidden_size": 160, "v_head_dim": 64, "intermediate_size": 256}
    write_packed_experts(tmp_path, config, settings, pack)
    alone = answers(runner(tmp_path, "bfloat16", 0, 1))
    assert on_every_rank(2, lambda rank: answers(runner(tmp_path, "bfloat16", rank, 2)))[0] == alone


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "int4"), ("llama", "fp8"), ("qwen3", "int8"), ("qwen3", "w8a8_int8")]
)
def test_quantized_while_loading(method: str, name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs()[name].tiny() | CUT)
    alone = answers(runner(tmp_path, "bfloat16", 0, 1, quantization=method))
    found = on_every_rank(2, lambda rank: answers(runner(tmp_path, "bfloat16", rank, 2, quantization=method)))[0]
    assert found == alone


@pytest.mark.skipif(not cpu_kernels(), reason="sgl-kernel is not installed")
@pytest.mark.parametrize("form", sorted(ACT_ORDER))
def test_columns_in_an_order_of_their_own(form: str, tmp_path: Path) -> None:
    """Ranks that cut them hold floats: the tokens stay, the bits do not."""
    settings, pack = FORMATS[form]
    write_packed(tmp_path, specs()["llama"].tiny() | CUT, settings, pack)
    alone = answers(runner(tmp_path, "float32", 0, 1))
    shared = on_every_rank(2, lambda rank: answers(runner(tmp_path, "float32", rank, 2)))[0]
    assert [job[0] for job in shared] == [job[0] for job in alone]  # type: ignore[index]


def test_quantized_inputs_on_the_torch_path(tmp_path: Path) -> None:
    """The reference rounds each segment of the inputs as the kernels do."""
    write_checkpoint(tmp_path, specs()["llama"].tiny() | CUT)
    alone = answers(runner(tmp_path, "float32", 0, 1, "torch_native", quantization="w8a8_int8"))
    shared = on_every_rank(
        2, lambda rank: answers(runner(tmp_path, "float32", rank, 2, "torch_native", quantization="w8a8_int8"))
    )[0]
    assert [job[0] for job in shared] == [job[0] for job in alone]  # type: ignore[index]
