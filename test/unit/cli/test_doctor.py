"""The doctor's lines: what is fine, what is not, and the fix."""

import json
import socket

import pytest

from moonlang.cli import doctor, host_checks, model_checks, mooncake_checks
from moonlang.cli.check import Check
from moonlang.config import alias
from moonlang.config.server_args import ServerArgs
from moonlang.mooncake.probe import Finding


def test_every_problem_has_a_fix(tmp_path):
    for check in doctor.examine(ServerArgs.create(model_path=tmp_path, port=0)):
        assert check.status == "ok" or check.fix, check


def test_exit_status_and_json(monkeypatch, capsys):
    lines = [Check("a", "ok", "fine"), Check("b", "warning", "so so", "Do this.")]
    monkeypatch.setattr(doctor, "examine", lambda args: lines)
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    lines.append(Check("c", "failed", "broken", "Mend it."))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "FAIL  c" in text
    assert "-> Mend it." in text
    assert "1 to fix" in text


def only(checks, name):
    return next(check for check in checks if check.name == name)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check = only(host_checks.run(ServerArgs.create(port=taken.getsockname()[1])), "port")
    assert check.status == "failed"
    assert "--port" in check.fix


def test_another_sglang(monkeypatch):
    monkeypatch.setattr(alias, "other_sglang", lambda: "0.5.23")
    check = only(host_checks.run(ServerArgs()), "sglang alias")
    assert (check.status, check.fix) == ("failed", "Run `pip uninstall sglang`, or use an environment of its own.")


def test_packages_of_our_own_metadata(monkeypatch):
    needs = ["numpy>=99999", "nowhere-to-be-found>=1", "msgspec", "openai>=2; extra == 'client'"]
    monkeypatch.setattr(host_checks.importlib.metadata, "requires", lambda name: needs)
    check = only(host_checks.run(ServerArgs()), "packages")
    assert check.status == "failed"
    assert "nowhere-to-be-found is missing" in check.text
    assert "does not satisfy >=99999" in check.text
    assert "msgspec" not in check.text


@pytest.mark.parametrize(("kb", "status"), [(100, "warning"), (64 << 20, "ok")])
def test_memory(tmp_path, kb, status):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {kb} kB\n")
    assert host_checks._memory(tmp_path).status == status


def test_shared_memory(tmp_path):
    assert host_checks._shared_memory(tmp_path / "none").status == "warning"
    assert host_checks._shared_memory(tmp_path).text.endswith(str(tmp_path))


def test_what_killed_servers_have_left_is_removed(tmp_path):
    dead = tmp_path / "moonlang-run-dead"
    dead.mkdir()
    (dead / "owner.lock").touch()
    (dead / "api.sock").touch()
    assert "1 killed" in host_checks._left_behind(tmp_path).text
    assert not dead.exists()
    assert host_checks._left_behind(tmp_path).text == "nothing"


def test_an_incomplete_model(tmp_path):
    (check,) = model_checks.run(ServerArgs.create(model_path=tmp_path))
    assert (check.name, check.status) == ("model", "failed")
    assert "config.json" in check.text


@pytest.mark.parametrize(
    ("found", "pair", "alone"),
    [
        (Finding(name="mooncake", status="ok", text="there"), "ok", "ok"),
        (Finding(name="mooncake", status="warning", text="missing", fix="Install it."), "failed", "warning"),
        (Finding(name="mooncake setup", status="failed", text="no card", fix="Use tcp."), "failed", "warning"),
    ],
)
def test_mooncake_must_work_only_where_it_is_used(monkeypatch, found, pair, alone):
    monkeypatch.setattr(mooncake_checks, "probe", lambda *_, **__: [found])
    (check,) = mooncake_checks.run(ServerArgs(disaggregation_mode="prefill"))
    assert (check.status, check.fix) == (pair, found.fix)
    (check,) = mooncake_checks.run(ServerArgs())
    assert check.status == alone
    (check,) = mooncake_checks.run(ServerArgs(disaggregation_mode="decode", disaggregation_transfer_backend="local"))
    assert check.status == alone
