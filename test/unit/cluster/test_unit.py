"""A unit keeps its process running: it hears of it, starts it again, gives it up, ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from moonlang.cluster.child import Launch
from moonlang.cluster.restarts import Limits
from moonlang.cluster.unit import State, Unit

QUICK = Limits(first_s=0.01, most_s=0.02, deaths=3, hopeless=2)
READY = "import socket, os; s = socket.socket(1, 2); s.connect(os.environ['NOTIFY_SOCKET']); "
SAY = "s.send(b'STATUS=loading\\nX_MOONLANG_SHARE=0.5'); s.send(b'READY=1\\nX_MOONLANG_URL=http://x:1'); "
STAY = "print('up', flush=True); " + READY + SAY + "import time; time.sleep(100)"


class Kept:
    """A unit that runs Python code, and what has become of it."""

    def __init__(self, folder: Path, code: str) -> None:
        self.states: list[State] = []
        self.failed = asyncio.Event()
        launch = Launch(kind="program", arguments=(sys.executable, "-c", code))
        self.unit = Unit(
            "server-0",
            "regular",
            lambda unit: launch,
            folder,
            folder,
            limits=QUICK,
            changed=lambda unit: self.states.append(unit.state),
            failed=lambda unit: self.failed.set(),
        )
        self.unit.start()

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(90):
            while not true():
                await asyncio.sleep(0.005)


def run(folder: Path, code: str, case: Callable[[Kept], Awaitable[None]]) -> None:
    async def main() -> None:
        kept = Kept(folder, code)
        try:
            await case(kept)
        finally:
            await kept.unit.stop(60)
            kept.unit.close()

    asyncio.run(main())


def test_it_is_ready_when_it_says_so_and_ends_when_told(tmp_path: Path) -> None:
    async def case(kept: Kept) -> None:
        await kept.unit.settled()
        assert (kept.unit.state, kept.unit.url) == ("ready", "http://x:1")
        assert kept.states[-3:] == ["starting", "starting", "ready"]
        pid = kept.unit.pid
        await kept.unit.stop(60)
        assert (kept.unit.state, kept.unit.pid, kept.unit.deaths) == ("ended", 0, 0)
        assert not Path(f"/proc/{pid}").exists()
        assert kept.unit.last_lines == ["up"]
        assert [path.name for path in tmp_path.iterdir()] == ["server-0.log"]

    run(tmp_path, STAY, case)


def test_one_that_is_killed_starts_again_until_it_is_a_storm(tmp_path: Path) -> None:
    async def case(kept: Kept) -> None:
        for _ in range(3):
            await kept.until(lambda: kept.unit.state == "ready")
            os.kill(kept.unit.pid, signal.SIGKILL)
            await kept.until(lambda: kept.unit.state != "ready")
        await kept.failed.wait()
        assert (kept.unit.state, kept.unit.status, kept.unit.pid) == ("failed", -signal.SIGKILL, 0)

    run(tmp_path, STAY, case)


def test_one_that_never_comes_up_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    async def case(kept: Kept) -> None:
        await kept.failed.wait()
        assert (kept.unit.deaths, kept.unit.status) == (2, 3)
        assert kept.unit.last_lines == ["no memory", "no memory"]

    run(tmp_path, "print('no memory'); raise SystemExit(3)", case)


def test_a_wrong_configuration_is_not_tried_again(tmp_path: Path) -> None:
    async def case(kept: Kept) -> None:
        await kept.failed.wait()
        assert kept.unit.deaths == 1

    run(tmp_path, "raise SystemExit(2)", case)


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    async def case(kept: Kept) -> None:
        await kept.unit.settled()
        await kept.unit.stop(0.1)
        assert kept.unit.status == -signal.SIGKILL

    run(tmp_path, "import signal; signal.signal(15, signal.SIG_IGN); " + STAY, case)
