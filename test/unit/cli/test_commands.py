"""The command `moonlang`: its commands, their output and their exit status."""

import json
import sys
import types

import pytest

from moonlang.cli.main import COMMANDS, main

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model_flags(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ["--model-path", str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init"]


def test_usage_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_unknown_command(capsys):
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moonlang ")


def test_serve_refuses_wrong_flags_with_status_2(capsys):
    assert main(["serve", "--page-size", "0"]) == 2
    assert capsys.readouterr().err == "Error: --page-size 0 is too small. The smallest value is 1.\n"


def test_serve_hands_the_arguments_to_the_server(monkeypatch):
    seen = []
    server = types.SimpleNamespace(serve=lambda args: seen.append(args) or 3)
    monkeypatch.setitem(sys.modules, "moonlang.entrypoints.http_server", server)
    assert main(["serve", "--port", "1234"]) == 3
    assert seen[0].port == 1234


def test_sim_is_found_when_called(monkeypatch):
    monkeypatch.setitem(sys.modules, "moonlang.sim.main", types.SimpleNamespace(main=len))
    assert main(["sim", "--seeds", "5"]) == 2


def test_explain(model_flags, capsys):
    assert main(["explain", *model_flags, "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["load_format"] == {"name": "load_format", "value": "dummy", "source": "given"}
    assert lines["context_length"]["value"] == 256
    assert lines["page_size"]["source"] not in ("given", "default")
    assert "port" not in lines
    assert main(["explain", *model_flags, "--all"]) == 0
    assert "--port " in capsys.readouterr().out


def test_explain_of_a_missing_folder(capsys):
    assert main(["explain", "--model-path", "./none"]) == 2
    assert "There is no folder ./none." in capsys.readouterr().err


def test_flags(capsys):
    assert main(["flags", "radix"]) == 0
    assert "supported  --disable-radix-cache" in capsys.readouterr().out
    assert main(["flags", "radix", "--status", "refused"]) == 0
    text = capsys.readouterr().out
    assert "--disable-radix-cache\n" not in text
    assert "refused    --radix-eviction-policy-config" in text
    assert main(["flags", "nothing-like-this"]) == 1
