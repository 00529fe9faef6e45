"""From `moonlang up` to the first token: python benchmark/first_token.py [--runs 3] [--cold] [--python PATH] [FLAGS]...

FLAGS are those of `moonlang up` (--prefill 1 --decode 1 --store). --cold: without any compiled Python file, so that
every library is compiled on the way, as nothing but a very new installation does. --python: that of another
environment. The client asks from the start, every 20 ms; the time is that of the first event with text.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

FLAGS = ["--prefill", "1", "--decode", "1", "--store"]
BODY = {
    "model": "default",
    "messages": [{"role": "user", "content": "Tell me of a fox."}],
    "max_tokens": 8,
    "stream": True,
}
DEADLINE_S = 300.0
POLL_S = 0.02


def first_token_s(python: str, flags: list[str], *, cold: bool) -> dict[str, float]:
    """Seconds to the first answer of the router, to readiness as the command says it, and to the first token; and of
    processor time in all processes, the end included."""
    before = _cpu_s()
    found = _measured(python, flags, cold=cold)
    return found | {"cpu": round(_cpu_s() - before, 2)}


def _cpu_s() -> float:
    """Of all processes that have been started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _measured(python: str, flags: list[str], *, cold: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if cold:
            environment["PYTHONPYCACHEPREFIX"] = folder
        output = Path(folder) / "output"
        begin = time.monotonic()
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [python, "-m", "moonlang", "up", "--name", f"first-{os.getpid()}", *flags], stdout=sink, env=environment
            )
        try:
            url = _url(output, process)
            reached, token = _ask(url, process)
            while " is ready after " not in (said := output.read_text()):
                time.sleep(POLL_S)
            ready = float(said.partition(" is ready after ")[2].split()[0])
            return {"router": round(reached - begin, 2), "ready": ready, "first_token": round(token - begin, 2)}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _url(output: Path, process: subprocess.Popen[bytes]) -> str:
    while "http://" not in (said := output.read_text()):
        if process.poll() is not None:
            raise SystemExit(f"moonlang up ended with {process.returncode}.")
        time.sleep(POLL_S)
    return "http://" + said.partition("http://")[2].split()[0]


def _ask(url: str, process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """When the router answered for the first time, and when the first token came."""
    reached = 0.0
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                reached = reached or time.monotonic()
                for line in response:
                    if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                        return reached, time.monotonic()
        except urllib.error.HTTPError:
            reached = reached or time.monotonic()
            time.sleep(POLL_S)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(POLL_S)
    raise SystemExit("There is no first token.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    own, flags = parser.parse_known_args()
    for _ in range(own.runs):
        print(json.dumps(first_token_s(own.python, flags or FLAGS, cold=own.cold)), flush=True)


if __name__ == "__main__":
    main()
