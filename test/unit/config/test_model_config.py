"""What is read from config.json and generation_config.json."""

import json

import pytest

from moonlang.base.errors import ConfigError
from moonlang.config import model_config
from moonlang.config.model_config import load_model_config
from moonlang.config.server_args import ServerArgs

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip


def load(folder, config, generation=None, **given):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(str(folder), ServerArgs.create(**given))


def test_dense_layers_of_a_mixture_may_be_whole_in_every_rank(tmp_path):
    assert not load(tmp_path, LLAMA).dense_whole
    assert load(tmp_path, LLAMA, moe_dense_tp_size=1).dense_whole


def test_llama(tmp_path):
    model = load(tmp_path, LLAMA, {"eos_token_id": [7, 2], "temperature": 0.6})
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (2, 4, 2, 16)
    assert (model.context_length, model.dtype, model.eos_token_ids) == (256, "bfloat16", (7, 2))
    assert model.generation["temperature"] == 0.6


def test_old_names(tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 32}
    model = load(tmp_path, config)
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (3, 2, 2, 4)
    assert (model.context_length, model.dtype, model.architectures) == (32, "float32", ())


def test_the_language_part_of_a_multimodal_config_is_lifted(tmp_path):
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    model = load(tmp_path, whole)
    assert model.architectures == ("Gemma3ForConditionalGeneration",)
    assert (model.model_type, model.vocab_size) == ("llama", 128)
    assert "text_config" not in model.hf


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_latents(tmp_path):
    """DeepSeek-V3 as published: pages keep one row of 576 numbers per token and layer, whatever the heads."""
    model = load(tmp_path, DEEPSEEK)
    assert (model.latent, model.num_kv_heads, model.head_dim, model.value_dim) == (True, 1, 576, 128)
    assert (model.num_heads, model.num_experts, model.context_length) == (128, 256, 163840)
    dense = load(tmp_path, LLAMA)
    assert (dense.latent, dense.value_dim, dense.num_experts) == (False, 16, None)
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        load(tmp_path, DEEPSEEK | {"model_type": "kimi_k2", "kv_lora_rank": None})


def test_class_defaults_of_a_sparse_config(tmp_path):
    """The text_config of google/gemma-3-4b-it, as published."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    model = load(tmp_path, {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"})
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) == (8, 4, 256, 262208)
    assert model.context_length == model.hf["max_position_embeddings"] == 131072


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_class_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CONFIG_MAPPING[model_type]()
    for name, value in model_config._CLASS_DEFAULTS[model_type].items():
        assert getattr(theirs, name) == value, name


def test_override(tmp_path):
    model = load(tmp_path, LLAMA, json_model_override_args='{"head_dim": 32, "architectures": ["X"]}')
    assert (model.head_dim, model.architectures) == (32, ("X",))


@pytest.mark.parametrize(
    ("wish", "dtype"), [("auto", "bfloat16"), ("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")]
)
def test_dtype(tmp_path, wish, dtype):
    assert load(tmp_path, LLAMA, dtype=wish).dtype == dtype


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"type": "dynamic", "factor": 4.0}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "default", "rope_theta": 10000.0}, 256),
        (
            {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}},
            512,
        ),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_context_length_with_rope_scaling(tmp_path, key, rope, length):
    assert load(tmp_path, LLAMA | {key: rope}).context_length == length


def test_context_length_wish(tmp_path, monkeypatch):
    assert load(tmp_path, LLAMA, context_length=100).context_length == 100
    with pytest.raises(ConfigError, match="SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"):
        load(tmp_path, LLAMA, context_length=257)
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    assert load(tmp_path, LLAMA, context_length=257).context_length == 257


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": "2"}, "hidden_layers"),
        ({"max_position_embeddings": None}, "--context-length"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantized (gptq, 3 bits)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "--quantization int8|int4"),
        ({"torch_dtype": "float8_e4m3fn"}, "--dtype bfloat16"),
    ],
)
def test_what_cannot_be_served(tmp_path, change, says):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, LLAMA | change)
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_broken_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="Fetch the file again"):
        load_model_config(str(tmp_path), ServerArgs())


@pytest.mark.parametrize(
    ("settings", "wish", "method", "dtype"),
    [
        (None, None, None, "float16"),
        (None, "int8", "int8", "float16"),
        ({"quant_method": "gptq", "bits": 4}, None, "gptq", "bfloat16"),
        ({"quant_method": "gptq", "bits": 8}, "gptq_marlin", "gptq", "bfloat16"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq", "awq", "bfloat16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "fp8", "bfloat16"),
    ],
)
def test_quantization(tmp_path, settings, wish, method, dtype):
    changes = {"quantization_config": settings} if settings else {}
    model = load(tmp_path, LLAMA | {"torch_dtype": "float16"} | changes, quantization=wish)
    assert (model.quantization and model.quantization.method, model.dtype) == (method, dtype)


@pytest.mark.parametrize(
    ("settings", "wish", "says"),
    [
        (None, "gptq", "config.json has no quantization_config"),
        ({"quant_method": "gptq", "bits": 4}, "awq", "quantized as gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, None, "awq, version gemv"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, None, "format pack-quantized"),
    ],
)
def test_quantization_that_cannot_be_served(tmp_path, settings, wish, says):
    changes = {"quantization_config": settings} if settings else {}
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, LLAMA | changes, quantization=wish)


def test_compressed_tensors(tmp_path):
    for kind, activations, method in (
        ("float", {}, "fp8"),
        ("int", None, "int8"),
        ("int", {"dynamic": True}, "w8a8_int8"),
    ):
        group = {"weights": {"type": kind, "num_bits": 8}, "input_activations": activations}
        settings = {"quant_method": "compressed-tensors", "format": f"{kind}-quantized", "config_groups": {"g": group}}
        assert load(tmp_path, LLAMA | {"quantization_config": settings}).quantization.method == method
