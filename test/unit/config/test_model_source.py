"""From --model-path to a complete folder, or to an error that says what to do. No test touches the network."""

import json
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from moonlang.base.errors import ConfigError
from moonlang.config import model_source
from moonlang.config.model_source import local_path, tokenizer_folder
from moonlang.config.server_args import ServerArgs


def write_safetensors(path, cut=0):
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(16)
    path.write_bytes(content[: len(content) - cut])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors")
    return tmp_path


def fails(says, **given):
    with pytest.raises(ConfigError) as caught:
        local_path(ServerArgs.create(**given))
    assert says in str(caught.value)
    assert caught.value.hint


def test_a_complete_folder(folder):
    assert local_path(ServerArgs.create(model_path=folder)) == str(folder)


def test_missing_parts(folder):
    (folder / "tokenizer.json").unlink()
    fails("no tokenizer", model_path=folder)
    assert local_path(ServerArgs.create(model_path=folder, skip_tokenizer_init=True))
    assert local_path(ServerArgs.create(model_path=folder, tokenizer_path="elsewhere"))
    (folder / "model.safetensors").unlink()
    fails("no weights", model_path=folder, skip_tokenizer_init=True)
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails("safe_serialization", model_path=folder, skip_tokenizer_init=True)
    assert local_path(ServerArgs.create(model_path=folder, skip_tokenizer_init=True, load_format="dummy"))
    (folder / "config.json").unlink()
    fails("no config.json", model_path=folder, load_format="dummy")


def test_shards(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"}}))
    write_safetensors(folder / "a.safetensors")
    fails("lacks b.safetensors and 1 more", model_path=folder)
    write_safetensors(folder / "b.safetensors")
    write_safetensors(folder / "c.safetensors")
    assert local_path(ServerArgs.create(model_path=folder))
    index.write_text("{}")
    fails("not a safetensors index", model_path=folder)


@pytest.mark.parametrize("cut", [1, 16, 20, 70])
def test_cut_off_weights(folder, cut):
    write_safetensors(folder / "model.safetensors", cut=cut)
    fails("Fetch the file again", model_path=folder)


def test_a_git_lfs_pointer_is_not_weights(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails("git lfs pull", model_path=folder)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none-there", "a/b/c"])
def test_paths_that_do_not_exist_are_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    fails("There is no folder", model_path=name)


def test_a_file_is_not_a_folder(folder):
    fails("is a file", model_path=folder / "model.safetensors")


def test_embedded_model(folder, monkeypatch):
    monkeypatch.setattr(model_source, "EMBEDDED_FOLDER", folder)
    assert local_path(ServerArgs()) == str(folder)
    monkeypatch.setattr(model_source, "EMBEDDED_FOLDER", folder / "none")
    fails("train_tiny.py")


def test_hub(folder, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("SGLANG_USE_MODELSCOPE", raising=False)
    given = ServerArgs.create(model_path="a/b", revision="r", download_dir="/d", tokenizer_path="t/t")
    assert local_path(given) == str(folder)
    assert tokenizer_folder(given, str(folder)) == str(folder)
    assert [name for name, _ in calls] == ["a/b", "t/t"]
    assert (calls[0][1]["revision"], calls[0][1]["cache_dir"]) == ("r", "/d")
    assert "*.safetensors" in calls[0][1]["allow_patterns"]
    assert "*.safetensors" not in calls[1][1]["allow_patterns"]
    assert "*.py" not in calls[0][1]["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub.LocalEntryNotFoundError("Cannot find it."), "HF_HUB_OFFLINE"),
        (hub.OfflineModeIsEnabled("Offline."), "HF_ENDPOINT"),
        (ConnectionError("No route."), "No route."),
        (hub.HfHubHTTPError.__bases__[0]("Too slow."), "Too slow."),
        (hub.HFValidationError("Bad name."), "neither a folder nor a hub name"),
    ],
)
def test_hub_errors(error, says, monkeypatch):
    def download(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("SGLANG_USE_MODELSCOPE", raising=False)
    fails(says, model_path="a/b")


def test_modelscope(folder, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    monkeypatch.setattr(model_source.importlib.util, "find_spec", lambda name: None)
    fails("pip install modelscope", model_path="a/b")

    class HubError(Exception):
        pass

    def download(name, **options):
        if name == "a/b":
            return str(folder)
        raise HubError("no such model")

    monkeypatch.setattr(model_source.importlib.util, "find_spec", lambda name: object())
    modules = {
        "modelscope": types.SimpleNamespace(__path__=[]),
        "modelscope.hub": types.SimpleNamespace(__path__=[]),
        "modelscope.hub.snapshot_download": types.SimpleNamespace(snapshot_download=download),
        "modelscope.hub.errors": types.SimpleNamespace(HubError=HubError),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert local_path(ServerArgs.create(model_path="a/b")) == str(folder)
    fails("no such model", model_path="a/c")
