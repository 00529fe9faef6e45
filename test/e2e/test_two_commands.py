"""The front door: what a user does first, with the files and lines that a user has. `scripts/serve` is started from an
unrelated folder; what it prints is pasted into a shell; then the pages of the documentation are followed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import pytest
from free_ports import free_port

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "scripts" / "serve"
PYTHON = ROOT / ".venv" / "bin" / "python"
START_S = 30.0  # processor time of a second start, up to the first answer; 4 on the machine of the figures
DEADLINE_S = 120.0


@dataclass
class Member:
    """A living process of a session. cpu_s: processor time it and its ended children have used."""

    command: str
    cpu_s: float


def session_members(session: int) -> list[Member]:
    members = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                members.append(Member(command, sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return members


@dataclass
class Served:
    """A server started by the command. lines: what it prints, None at the end."""

    process: subprocess.Popen[str]
    port: int
    lines: Queue[str | None]
    log: Path
    start_cpu_s: float = 0.0

    def next_line(self, start: str) -> str:
        """The next printed line that begins with `start`."""
        while (line := self.lines.get(timeout=DEADLINE_S)) is not None:
            if line.startswith(start):
                return line
        raise AssertionError(f"The server has ended:\n{self.log.read_text()}")


def forward(process: subprocess.Popen[str], lines: Queue[str | None]) -> None:
    """Read what the server prints until it ends, so that it never waits for a reader."""
    assert process.stdout is not None
    with process.stdout as stdout:
        for line in stdout:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def start(folder: Path, *flags: str) -> Served:
    port = free_port()
    log = folder / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [SERVE, "--port", str(port), *flags],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    served = Served(process, port, Queue(), log)
    threading.Thread(target=forward, args=(process, served.lines), daemon=True).start()
    try:
        served.next_line("MoonLang serves")
    except (AssertionError, Empty):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    served.start_cpu_s = sum(member.cpu_s for member in session_members(process.pid))
    return served


def stop(served: Served) -> int:
    served.process.send_signal(signal.SIGTERM)
    return served.process.wait(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start(tmp_path_factory.mktemp("elsewhere"), "--enable-cache-report", "--enable-metrics")
    yield served
    if served.process.poll() is None:
        stop(served)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def paste(line: str, folder: Path) -> str:
    """What a shell prints for a pasted line."""
    done = run(["bash", "-ec", line], folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_second_start_is_fast(served: Served) -> None:
    assert served.start_cpu_s < START_S
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health", timeout=DEADLINE_S) as answer:
        assert answer.status == 200


def test_printed_lines_work_as_pasted(served: Served, tmp_path: Path) -> None:
    curl, python = served.next_line("curl"), served.next_line(shlex.quote(str(PYTHON)))
    assert f":{served.port}/" in curl
    answer = json.loads(paste(curl, tmp_path))
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["choices"][0]["message"]["content"].strip() in paste(python, tmp_path)


def steps(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a page that a reader types while the server of the first block runs."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    return [(name, body) for name, body in blocks if name in ("bash", "python", "text") and "scripts/" not in body]


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("tutorial.md", 10),
        ("how-to/structured-output.md", 3),
        ("how-to/metrics.md", 2),
        ("how-to/offline-engine.md", 2),
    ],
)
def test_pages_can_be_followed(page: str, blocks: int, served: Served, tmp_path: Path) -> None:
    """Each block runs; a `text` block behind it is what it prints, `...` standing for anything."""
    printed = ""
    assert len(steps(page)) == blocks
    for language, body in steps(page):
        body = body.replace(":30000", f":{served.port}")
        if language == "bash":
            printed = paste(body, tmp_path)
        elif language == "python":
            (tmp_path / "step.py").write_text(body)
            printed = paste(f"{shlex.quote(str(PYTHON))} step.py", tmp_path)
        else:
            pattern = ".*".join(re.escape(part) for part in body.strip().split("..."))
            as_told = re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None
            assert as_told, f"expected:\n{body}\nprinted:\n{printed[:2000]}"


def test_one_warning_a_flag_and_sigterm_ends_everything(tmp_path: Path) -> None:
    served = start(tmp_path, "--enable-dynamic-chunking")
    assert served.log.read_text().count("--enable-dynamic-chunking has no effect") == 1
    session = served.process.pid
    assert len(session_members(session)) > 1, "the roles run as processes of their own"
    stop(served)
    assert session_members(session) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", served.port)) != 0


def test_wrong_flag_is_explained_once(tmp_path: Path) -> None:
    done = run([str(SERVE), "--unknown-flag"], tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("--unknown-flag") == 1
