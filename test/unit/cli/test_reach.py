"""The doctors of two hosts, in two threads of one."""

import contextlib
import socket
import threading

import pytest

from moonlang.base.errors import ConfigError
from moonlang.cli import doctor, reach
from moonlang.mooncake import lib

TOKEN = "a token"
END_S = 60.0


@contextlib.contextmanager
def listening(said, calls=1):
    """A listener that answers `calls` doctors; what it says of them goes to `said`."""
    listener = reach.Listener("127.0.0.1", 0, TOKEN)
    thread = threading.Thread(target=lambda: said.extend(listener.serve_one() for _ in range(calls)))
    thread.start()
    try:
        yield f"127.0.0.1:{listener.port}"
    finally:
        thread.join(END_S)
        listener.close()
        assert not thread.is_alive()


@pytest.mark.skipif(bool(lib.how_to_get()), reason=lib.how_to_get() or "-")
def test_both_ways():
    said = []
    with listening(said) as peer:
        checks = list(reach.checks(peer, TOKEN))
    assert [(check.name, check.status) for check in checks] == [
        (f"to {peer}", "ok"),
        (f"from {peer}", "ok"),
        (f"data from {peer}", "ok"),
        (f"data to {peer}", "ok"),
    ]
    assert "verified" in checks[2].text
    assert said == ["127.0.0.1: answered"]


def test_data_that_arrives_damaged(monkeypatch):
    class Damaged(reach.Trial):
        def received(self):
            return super().received() ^ 1

    monkeypatch.setattr(reach, "Trial", Damaged)
    with listening([]) as peer:
        checks = list(reach.checks(peer, TOKEN))
    assert [check.status for check in checks] == ["ok", "ok", "failed", "failed"]


def test_without_mooncake_messages_are_checked_still(monkeypatch):
    monkeypatch.setattr(lib, "how_to_get", lambda: "Install it.")
    with listening([]) as peer:
        checks = list(reach.checks(peer, TOKEN))
    assert [check.status for check in checks] == ["ok", "ok", "warning"]


def test_a_way_back_that_is_closed(monkeypatch):
    monkeypatch.setattr(lib, "how_to_get", lambda: "Install it.")
    monkeypatch.setattr(reach, "_call_back", lambda host, port: "timed out")
    with listening([]) as peer:
        checks = list(reach.checks(peer, TOKEN))
    assert (checks[1].status, "firewall" in checks[1].fix) == ("failed", True)


def test_another_token():
    said = []
    with listening(said) as peer:
        checks = list(reach.checks(peer, "a guess"))
    assert [check.status for check in checks] == ["ok", "failed"]
    assert "token" in checks[1].fix
    assert said == ["127.0.0.1: it does not know the token."]


@pytest.mark.parametrize("sent", [b"", b"\xff\xfe\n", b"{}\n", b"[" * (70 << 10)])
def test_a_stranger_ends_nothing(sent):
    said = []
    hung_up = contextlib.suppress(OSError)  # the listener, maybe before all was said
    with listening(said) as peer, socket.create_connection(reach.address(peer)) as stranger, hung_up:
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        stranger.makefile("rb").read()
    assert said[0].startswith("127.0.0.1: ")
    assert said != ["127.0.0.1: answered"]


def test_what_listen_prints_can_be_pasted(monkeypatch, capsys):
    """Whatever is drawn: bytes whose base64 begins with a dash, here."""

    def interrupted(listener):
        raise KeyboardInterrupt

    monkeypatch.setattr("secrets.token_bytes", lambda size: b"\xf8" * size)
    monkeypatch.setattr(reach.Listener, "serve_one", interrupted)
    assert doctor.main(["--listen", "127.0.0.1:0"]) == 0
    words = capsys.readouterr().out.split("moonlang doctor ")[1].split()
    parsed = doctor._parser().parse_args(words)
    assert ([parsed.token], len(parsed.peer)) == (words[-1:], 1)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        checks = list(reach.checks(f"127.0.0.1:{free.getsockname()[1]}", TOKEN))
    assert [check.status for check in checks] == ["failed"]
    assert "--listen" in checks[0].fix


def test_addresses():
    assert reach.address("[::1]:80") == ("::1", 80)
    assert reach.address("0", listen=True) == ("0.0.0.0", 0)
    for wrong in ("80", "host", "host:", "host:99999", ":80"):
        with pytest.raises(ConfigError, match="no address"):
            reach.address(wrong)
