"""ServerArgs from keywords, from a command line and from a YAML file."""

import msgspec
import pytest

from moonlang.base.errors import ConfigError
from moonlang.config import build
from moonlang.config.server_args import ServerArgs, parse, prepare_server_args


def test_no_flags_are_the_defaults():
    assert parse([]) == ServerArgs() == ServerArgs.create()


def test_json_round_trip():
    args = parse(["--bucket-inter-token-latency", "0.1", "1", "--extra-metric-labels", '{"a": "b"}', "--port", "1"])
    assert args.bucket_inter_token_latency == (0.1, 1.0)
    assert msgspec.json.decode(msgspec.json.encode(args), type=ServerArgs) == args


def test_command_line_and_keywords_agree():
    argv = ["--model", "m", "--page-size", "8", "--context-length=32Ki", "--disable-radix-cache", "--mem-frac", "0.5"]
    args = prepare_server_args(argv)
    assert args == ServerArgs.create(
        model_path="m", page_size=8, context_length=32768, disable_radix_cache=True, mem_fraction_static=0.5
    )


def test_keywords_take_aliases_text_and_none(tmp_path):
    args = ServerArgs.create(model=tmp_path, page_size="16", tensor_parallel_size=1, watchdog_timeout=5, port=None)
    assert (args.model_path, args.page_size, args.watchdog_timeout, args.port) == (str(tmp_path), 16, 5.0, 30000)


def test_json_flags_take_objects():
    args = ServerArgs.create(json_model_override_args={"rope_theta": 1}, preferred_sampling_params={"top_p": 0.5})
    assert args.json_model_override_args == '{"rope_theta":1}'
    assert args.preferred_sampling_params == {"top_p": 0.5}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"page_sze": 16}, "--page-size"),
        ({"page_size": 0}, "smallest value is 1"),
        ({"page_size": 1.5}, "takes an integer"),
        ({"page_size": True}, "takes an integer"),
        ({"port": 70000}, "largest value is 65535"),
        ({"watchdog_timeout": float("inf")}, "finite"),
        ({"mem_fraction_static": float("nan")}, "finite"),
        ({"max_total_tokens": 2**63}, "finite"),
        ({"schedule_policy": "best"}, "lpm, random, fcfs"),
        ({"preferred_sampling_params": [1]}, "JSON object"),
        ({"json_model_override_args": "[1]"}, "JSON object"),
        ({"json_model_override_args": "{"}, "JSON object"),
        ({"attn_cp_size": 2}, "one device"),
        ({"config": "x.yaml"}, "no argument 'config'"),
        ({"chunked_prefill_size": 0}, "-1"),
        ({"ssl_keyfile": "k"}, "--ssl-certfile"),
        ({"messaging_backend": "inproc"}, "--in-process"),
        ({"messaging_backend": "zmq", "in_process": True}, "Leave out"),
        ({"messaging_backend": "mooncake", "in_process": True}, "Leave out"),
    ],
)
def test_what_is_wrong_is_named(values, says):
    with pytest.raises(ConfigError) as caught:
        ServerArgs.create(**values)
    assert says in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        ServerArgs.create(page_size=0, attn_cp_size=2, nonsense=1)
    assert all(word in str(caught.value) for word in ("--page-size", "--attn-cp-size", "nonsense"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--pagesize", "3"], "--page-size"),
        (["--port"], "expected one argument"),
        (["--port", "x"], "not an integer"),
        (["stray"], "stray"),
        (["--no-dllm-f"], "--dllm-fdfo false"),
        (["--no-port"], "--no-port"),
        (["--no-such"], "no flag --such"),
        (["--p", "1"], "--page-size"),
        (["--disable-radix-cache=1"], "ignored explicit argument"),
        (["--attention-backend", "flashinfer"], "torch_native"),
    ],
)
def test_bad_command_lines(argv, says):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert says in str(caught.value)


def test_help_lists_supported_flags_only(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--page-size" in text
    assert "--attn-cp-size" not in text


def test_a_flag_without_effect_warns_once(monkeypatch):
    said = []
    monkeypatch.setattr(build._log, "warning", lambda text, *values: said.append(text % values))
    parse(["--cuda-graph-max-bs", "4", "--cuda-graph-max-bs-decode", "8", "--torch-compile-max-bs", "32"])
    assert len(said) == 1
    assert "--cuda-graph-max-bs-decode has no effect: " in said[0]


def test_yaml_file_under_the_command_line(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(
        "model-path: m\npage_size: 8\nport: 1234\ndisable-radix-cache: true\ntrust-remote-code: false\n"
        "preferred-sampling-params: {top_p: 0.5}\nuvicorn-access-log-exclude-prefixes: [/health, /metrics]\ntp: 1\n"
    )
    args = parse(["--config", str(file), "--port", "99"])
    assert (args.model_path, args.page_size, args.port, args.disable_radix_cache) == ("m", 8, 99, True)
    assert args.uvicorn_access_log_exclude_prefixes == ("/health", "/metrics")
    assert args.preferred_sampling_params == {"top_p": 0.5}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("page-sizes: 8", "--page-size"),
        ("- a\n- b", "no mapping"),
        ("a: [", "not YAML"),
        ("page-size: many", "not an integer"),
        ("attn-cp-size: 4", "one device"),
        ("config: other.yaml", "another file"),
    ],
)
def test_bad_yaml_files(tmp_path, content, says):
    file = tmp_path / "server.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(file)])
    assert says in str(caught.value)


def test_missing_and_empty_yaml_files(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert parse(["--config", str(tmp_path / "empty.yaml")]) == ServerArgs()
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(["--config", str(tmp_path / "none.yaml")])
