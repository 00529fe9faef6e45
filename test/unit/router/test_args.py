"""The router's command line."""

from __future__ import annotations

import pytest

from moonlang.base.errors import ConfigError
from moonlang.router import reference
from moonlang.router.args import NO_EFFECT, RouterArgs, parse


def test_the_command_lines_of_the_documents() -> None:
    lists = parse("--prefill http://A:30000,http://B:30000 --decode http://A:30001,http://B:30001 --port 8000".split())
    flags = parse(
        "--prefill http://A:30000 --prefill http://B:30000 --decode http://A:30001 --decode http://B:30001 --port 8000"
        " --pd-disaggregation".split()
    )
    assert lists.prefill == flags.prefill == (("http://A:30000", None), ("http://B:30000", None))
    assert lists.decode == flags.decode == ("http://A:30001", "http://B:30001")
    assert lists.pairs
    assert flags.pairs
    assert not parse(["--worker-urls", "http://a:1", "b:2", "--worker-urls", "c:3"]).pairs


def test_bootstrap_ports() -> None:
    args = parse("--prefill http://a:1 8998 --prefill b:2 none c:3 9000 --decode d:4".split())
    assert args.prefill == (("http://a:1", 8998), ("http://b:2", None), ("http://c:3", 9000))


def test_what_the_other_router_needs_is_accepted_and_said_to_be_idle(caplog: pytest.LogCaptureFixture) -> None:
    assert parse(["--worker-startup-timeout-secs", "5", "--request-timeout-secs=9"]) == RouterArgs()
    assert [record.args[0] for record in caplog.records if record.args] == [  # type: ignore[index]
        "--worker-startup-timeout-secs",
        "--request-timeout-secs",
    ]
    assert not set(NO_EFFECT) & set(RouterArgs.__dataclass_fields__)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--prefil x", "Closest: --prefill"),
        ("--dp-aware", "There is no flag --dp-aware"),
        ("--policy best", "Choose one of: random"),
        ("--port 70000", r"\[0, 65535\]"),
        ("--cache-threshold 1.5", r"\[0, 1\]"),
        ("--retry-max-retries x", "is not an integer"),
        ("--prefill 8998", "is no URL"),
        ("--prefill a:1 8998 8999", "is no URL"),
        ("--prefill a:1 99999", "is no port"),
        ("--decode ftp://a", "is not the URL"),
        ("--worker-urls a:1 --decode b:1", "make pairs"),
    ],
)
def test_what_is_wrong_is_said(line: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse(line.split())


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in RouterArgs.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


def test_the_reference_is_what_the_generator_writes() -> None:
    assert reference.FILE.read_text() == reference.text(), "run python -m moonlang.router.reference"
