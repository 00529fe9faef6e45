"""What `moonlang up` understands, and what it refuses with what hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from moonlang.base.errors import ConfigError
from moonlang.cluster.args import parse, understood
from moonlang.disaggregation.frames import TOKEN_VARIABLE


def test_flags_go_where_they_belong() -> None:
    args = parse(["--prefill", "2", "--tp-size", "4", "--router-policy", "random", "--page-size=32", "--decode", "3"])
    assert (args.prefill, args.decode, args.replicas, args.count) == (2, 3, 0, 5)
    assert args.server_flags == ("--tp-size", "4", "--page-size=32")
    assert args.router_flags == ("--policy", "random")
    found = understood(args.server_flags, args.role_flags)
    assert {(each.tp_size, each.page_size) for each in found.values()} == {(4, 32)}


def test_a_role_has_flags_of_its_own() -> None:
    args = parse(["--tp-size", "2", "--for-decode", "--disaggregation-decode-fallback --tp-size 4"])
    found = understood(args.server_flags, args.role_flags)
    assert {role: each.tp_size for role, each in found.items()} == {"regular": 2, "prefill": 2, "decode": 4}
    assert found["decode"].disaggregation_decode_fallback


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        ("", (0, 0, 1)),
        ("--replicas 3", (0, 0, 3)),
        ("--prefill 2", (2, 1, 0)),
        ("--decode 2", (1, 2, 0)),
        ("--join a:1 --token t --decode 2", (0, 2, 0)),
        ("--join a:1 --token t", (0, 0, 1)),
    ],
)
def test_how_many(words: str, counts: tuple[int, int, int]) -> None:
    args = parse(words.split())
    assert (args.prefill, args.decode, args.replicas) == counts


def test_a_store_has_a_size() -> None:
    assert parse([]).store == ""
    assert parse(["--store"]).store == "1gb"
    assert parse(["--store", "500mb"]).store == "500mb"


def test_a_folder_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["--model-path", "model"]).server_flags == ("--model-path", str(tmp_path / "model"))
    assert parse(["--model-path=model"]).server_flags == (f"--model-path={tmp_path / 'model'}",)
    assert parse(["--model-path", "Qwen/Qwen3-0.6B"]).server_flags == ("--model-path", "Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--tp-sise 1", "no flag --tp-sise"),
        ("--prefill x", "invalid int"),
        ("--replicas 1 --prefill 1", "pairs"),
        ("--prefill 1 --decode 0", "needs a prefill and a decode"),
        ("--replicas 1000", "0, 64"),
        ("--store lots", "--store cannot be"),
        ("--name Über", "--name"),
        ("--disaggregation-mode prefill", "--disaggregation-mode"),
        ("--nnodes 2", "--nnodes"),
        ("--for-decode=--tp-sise", "--tp-sise"),
        ("--for-decode '", "--for-decode"),
        ("--for-prefill=--nnodes=2", "--nnodes"),
        ("--join a:1 --token t --for-decode x", "--for-decode does not go with --join"),
        ("--join a", "HOST|10.0.0.1:30000"),
        ("--join a:1 --token t --port 3", "--port does not go with --join"),
        ("--join a:1 --token t --tp-size 3", "--tp-size does not go with --join"),
    ],
)
def test_what_cannot_be_is_said(words: str, hint: str) -> None:
    words_given = words.split()
    if "--join" in words_given and "--token" not in words_given:
        words_given += ["--token", "t"]
    with pytest.raises(ConfigError, match=hint):
        parse(words_given)


def test_to_join_takes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="--token"):
        parse(["--join", "a:1"])
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    args = parse(["--join", "[::1]:7", "--model-path", "/elsewhere"])
    assert (args.join, args.token, args.server_flags) == (("::1", 7), "secret", ("--model-path", "/elsewhere"))
