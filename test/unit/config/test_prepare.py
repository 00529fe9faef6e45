"""From arguments and a folder to what the roles run with."""

import json

import pytest

from moonlang.config.prepare import prepare
from moonlang.config.server_args import ServerArgs

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float16",
}


@pytest.mark.parametrize(
    ("device", "wish", "dtype"),
    [
        ("cpu", "auto", "bfloat16"),
        ("cpu", "half", "float16"),
        ("cpu", "float32", "float32"),
        ("cuda", "auto", "float16"),
    ],
)
def test_float16_checkpoints_run_in_bfloat16_on_a_cpu(tmp_path, device, wish, dtype):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    prepared = prepare(ServerArgs(model_path=str(tmp_path), device=device, dtype=wish, load_format="dummy"))
    assert (prepared.args.dtype, prepared.model.dtype) == (dtype, dtype)
    assert ("CPUs have no arithmetic" in prepared.reasons.get("dtype", "")) == (dtype == "bfloat16")
