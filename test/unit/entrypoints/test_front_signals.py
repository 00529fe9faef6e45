"""A terminal that is closed ends a server as SIGTERM does, unless nohup is in front of it."""

from __future__ import annotations

import signal

import pytest

from moonlang.entrypoints import front


def test_a_closed_terminal_is_a_sigterm() -> None:
    with pytest.raises(SystemExit) as ended, front.stopped_by_signals():
        signal.raise_signal(signal.SIGHUP)
    assert ended.value.code == 0


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with front.stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
