"""From arguments and a folder to what the roles run with."""

import json

import pytest
from tiny_folder import write_tiny_folder

from moonlang.config.prepare import prepare
from moonlang.config.server_args import ServerArgs


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
    config = write_tiny_folder(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "float16"}))
    args = ServerArgs(model_path=str(tmp_path), device=device, dtype=wish, load_format="dummy")
    prepared = prepare(args)
    assert (prepared.args.dtype, prepared.model.dtype) == (dtype, dtype)
    assert ("CPUs have no arithmetic" in prepared.reasons.get("dtype", "")) == (dtype == "bfloat16")
