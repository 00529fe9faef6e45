"""Every flag of SGLang works, is accepted with a warning, or is refused with what to do instead."""

import dataclasses
import json
import logging
import re
import shlex
from importlib import resources
from pathlib import Path

import pytest

import moonlang
from moonlang.base.errors import ConfigError
from moonlang.config import table
from moonlang.config.server_args import ServerArgs, parse

FILE = json.loads(resources.files("moonlang.config").joinpath("sglang_flags.json").read_text("utf-8"))
ENTRIES = {entry["names"][0]: entry for entry in FILE["flags"]}
SGLANG = {name: entry for name, entry in ENTRIES.items() if entry["section"] != "removed"}
ROWS = [row for row in table.load().rows.values() if row.section != table.OWN_SECTION]
SUPPORTED = [row for row in ROWS if row.status == "supported" and row.has_field]

OWN_FLAGS = [
    *("disaggregation_decode_fallback", "disaggregation_layer_groups", "disaggregation_timeout_s"),
    *("messaging_backend", "in_process", "request_timeout_s"),
]
# Fields that act within the configuration itself: where the model comes from, and what is checked at start.
READ_BY_CONFIG = {
    "elastic_ep_backend",
    "ep_size",
    "moe_dense_tp_size",
    "revision",
    "download_dir",
    "json_model_override_args",
    "sampling_backend",
    "disaggregation_decode_enable_offload_kvcache",
    "ep_num_redundant_experts",
    "eplb_algorithm",  # there is one
}
# Choices that SGLang does not have.
OWN_CHOICES = {
    "--model-impl": {"moonlang"},
    "--quantization": {"int8", "int4"},
    "--attention-backend": {"cpu"},
    "--disaggregation-transfer-backend": {"local"},
    "--kv-cache-dtype": {"int8"},
    "--hicache-storage-backend": {"memory", "null"},
    "--moe-a2a-backend": {"torch"},
}
OWN_DEFAULTS = {"--disaggregation-enable-kv-checksum": True}  # pages that travel are checked unless that is turned off


def by_name(rows):
    return pytest.mark.parametrize("row", rows, ids=[row.names[0] for row in rows])


def sample(row):
    """A legal value that is not the default, as words of a command line."""
    if row.kind == "bool":
        return [row.names[0]]
    if row.kind == "bool/no":
        return [row.names[0] if not row.default else "--no-" + row.names[0][2:]]
    others = [choice for choice in row.choices if choice != row.default]
    if row.choices:
        return [row.names[0], str(others[0])] if others else None
    number = (row.default or 1) + 1 if isinstance(row.default or 1, (int, float)) else 1
    if row.flag is not None and row.flag.high is not None:
        number = row.flag.high
    text = {"int": str(number), "float": str(number), "str": "some-text", "json": '{"a": 1}'}[row.kind]
    own = {"--json-model-override-args": '{"a": 1}', "--kv-events-config": '{"publisher": "zmq"}'}
    text = own.get(row.names[0], text)
    return [row.names[0], text]


class Listener(logging.Handler):
    """Keeps what a logger says, whatever handlers and propagation other tests have set up."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings():
    logger, listener = logging.getLogger("moonlang.config.build"), Listener()
    logger.addHandler(listener)
    yield listener.messages
    logger.removeHandler(listener)


def test_the_table_is_complete():
    assert len(SGLANG) == 531
    assert {entry["status"] for entry in ENTRIES.values()} == {"supported", "noop", "refused"}
    assert all(entry["status"] == "supported" or FILE["reasons"][entry["why"]] for entry in ENTRIES.values())


@by_name([row for row in ROWS if row.status == "noop"])
def test_without_effect(row, warnings):
    words = sample(row)
    args = parse(words)
    assert [f"Warning: {row.names[0]} has no effect: {row.why}."] == warnings
    fields = {field.name for field in dataclasses.fields(ServerArgs)} - {row.dest}
    assert all(getattr(args, name) == getattr(ServerArgs(), name) for name in fields)


@by_name([row for row in ROWS if row.status == "refused"])
def test_refused(row):
    words = sample(row)
    if words is None:
        return  # its only legal value is the default
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert row.names[0] in caught.value.message
    assert caught.value.hint == row.why


@by_name([row for row in SUPPORTED if row.names[0] not in ("--ssl-keyfile", "--ssl-certfile")])
def test_supported(row, warnings):
    words = sample(row)
    if words is None:
        return  # one choice, chosen by `resolve` in any case
    assert getattr(parse(words), row.dest) != row.default
    assert warnings == []


def test_tls_files_go_together():
    assert parse(["--ssl-keyfile", "k", "--ssl-certfile", "c"]).ssl_keyfile == "k"


@by_name([row for row in ROWS if row.kind not in ("bool", "bool/no") and row.default not in (None, False, ())])
def test_the_default_is_always_fine(row, warnings):
    assert parse([f"{row.names[0]}={row.default}"]) == ServerArgs()
    assert warnings == []


@by_name(SUPPORTED)
def test_supported_flags_are_those_of_sglang(row):
    """Same default, same kind of value, and no choice that SGLang does not know."""
    entry = SGLANG[row.names[0]]
    default = tuple(entry["default"]) if isinstance(entry["default"], list) else entry["default"]
    assert row.default == OWN_DEFAULTS.get(row.names[0], default)
    assert row.kind == entry["type"]
    assert (row.nargs or "") == entry.get("nargs", "")
    choices = entry.get("choices", [])
    known = {str(choice) for choice in (FILE["choice_lists"][choices] if isinstance(choices, str) else choices)}
    if known:
        assert {str(choice) for choice in row.choices} - known <= OWN_CHOICES.get(row.names[0], set())


def test_every_field_is_a_flag_of_sglang_or_one_of_our_own():
    names = [field.name for field in dataclasses.fields(ServerArgs)]
    assert [name for name in names if table.option_name(name) not in SGLANG] == OWN_FLAGS
    assert all(row.has_field for row in ROWS if row.status == "supported" and row.dest != "config")


def test_supported_flags_are_read_by_the_program():
    """A field that nothing outside the configuration reads would be a flag that is silently ignored."""
    packages = [path for path in Path(moonlang.__file__).parent.iterdir() if path.name not in ("config", "cli")]
    files = [file for package in packages for file in [package, *package.rglob("*.py")] if file.suffix == ".py"]
    source = "\n".join(file.read_text("utf-8") for file in files)
    rows = [row for row in table.load().rows.values() if row.status == "supported" and row.has_field]
    unread = {row.dest for row in rows if not re.search(rf"\.{row.dest}\b", source)}
    assert unread == READ_BY_CONFIG


def test_hints_name_flags_that_work():
    for name, reason in FILE["reasons"].items():
        for flag in re.findall(r"--[a-z][a-z0-9-]*", reason):
            row = table.load().find(flag)
            assert flag in row.names, f"{name}: {flag}"
            assert row.status == "supported" or "null" in reason, f"{name}: {flag}"


def shortest_prefixes():
    """For every spelling the shortest abbreviation that argparse would take in SGLang."""
    options = sorted(table.load().spellings)
    for index, option in enumerate(options):
        neighbours = [options[i] for i in (index - 1, index + 1) if 0 <= i < len(options)]
        for length in range(3, len(option)):
            if not any(other.startswith(option[:length]) for other in neighbours):
                yield option[:length], option
                break


def test_abbreviations_that_argparse_takes():
    known = table.load()
    pairs = list(shortest_prefixes())
    assert len(pairs) > 400
    for prefix, option in pairs:
        assert known.find(prefix) is known.spellings[option], prefix


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--tp", "tp_size"),
        ("--dp", "dp_size"),
        ("--ep", "ep_size"),
        ("--pp", "pp_size"),
        ("--mem-frac", "mem_fraction_static"),
        ("--cuda-graph-max-bs", "cuda_graph_max_bs_decode"),
        ("--cuda-graph-bs", "cuda_graph_bs_decode"),
        ("--stream-output", "incremental_streaming_output"),
        ("--nsa-prefill-backend", "dsa_prefill_backend"),
        ("--max-micro-batch-size", "pp_max_micro_batch_size"),
        ("--enable-hicache", "enable_hierarchical_cache"),
        ("--in-p", "in_process"),
    ],
)
def test_words_of_old_scripts(word, name):
    assert table.load().find(word).dest == name


ACCEPTED = [
    "--model-path meta-llama/Llama-3.1-8B-Instruct",
    "--model-path Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
    "--model-path M --port 30000 --host 192.168.0.137 --tp-size 1 --mem-fraction-static 0.8",
    "--model-path M --host 192.168.0.137 --tp-size 2",
    "--model-path M --tp-size 4 --nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:5000",
    "--model-path M --disaggregation-mode null --disaggregation-transfer-backend mooncake --moe-a2a-backend none",
    "--model-path M --disaggregation-mode prefill --disaggregation-transfer-backend mooncake "
    "--disaggregation-ib-device mlx5_0",
    "--model-path Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4 --disaggregation-mode decode --port 30001 --base-gpu-id 2 "
    "--host 192.168.0.137 --tp-size 2",
    "--model-path Q --disaggregation-mode prefill --port 30000 --host 192.168.0.137 --tp-size 1",
    "--model-path Q --disaggregation-mode decode --port 30001 --base-gpu-id 0 --host 192.168.0.137 "
    "--disaggregation-transfer-backend mooncake_tcp --num-reserved-decode-tokens 128",
    "--disaggregation-mode decode --no-disaggregation-enable-kv-checksum --disaggregation-decode-fallback",
    "--enable-hierarchical-cache --hicache-storage-backend mooncake --model-path M",
    "--enable-hierarchical-cache --hicache-storage-backend mooncake --model-path M "
    '--hicache-storage-backend-extra-config \'{"master_server_address": "127.0.0.1:50051", "protocol": "rdma"}\'',
    "--load-format dummy --tp 1 --dp 1 --enable-dp-attention --cuda-graph-max-bs 8 --disable-cuda-graph",
    "--model-path deepseek-ai/DeepSeek-V3 --moe-a2a-backend mooncake --mooncake-ib-device mlx5_0",
    "--model-path M --tp 4 --moe-a2a-backend mooncake --enable-eplb --ep-num-redundant-experts 8 --eplb-algorithm auto",
    "--model-path M --tp 4 --ep 4 --moe-a2a-backend mooncake --enable-two-batch-overlap --moe-dense-tp-size 1",
    "--attention-backend torch_native --sampling-backend pytorch --grammar-backend xgrammar --device cpu",
]
# Command line -> what the refusal names.
REFUSED = {
    "--model-path M --disaggregation-mode prefill --enable-pdmux": "two servers",
    "--model-path deepseek-ai/DeepSeek-V3 --tp-size 4 --enable-paged-experts": "nothing of the kind for experts",
}


@pytest.mark.parametrize("line", ACCEPTED)
def test_commands_that_start(line):
    assert isinstance(parse(shlex.split(line)), ServerArgs)


@pytest.mark.parametrize("line", REFUSED)
def test_commands_of_later_versions(line):
    with pytest.raises(ConfigError) as caught:
        parse(shlex.split(line))
    assert REFUSED[line] in str(caught.value)
    assert "not there in this version" in str(caught.value) or "this version" in str(caught.value).lower()
