"""A cluster from Python: `with moonlang.Cluster(prefill=1, decode=1) as cluster: cluster.client()`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from moonlang.base.clock import NS_PER_S, monotonic_ns, sleep_s
from moonlang.base.errors import ConfigError, PeerError
from moonlang.cluster import control, directory
from moonlang.cluster.control import Order, Reply
from moonlang.cluster.status import Status
from moonlang.roles.children import environment

START_S = 3600.0  # fetching a large model takes its time; a cluster that ends is noticed at once
STOP_S = 90.0
LOOK_S = 0.05
_TAIL_BYTES = 8192


class Cluster:
    """A cluster of this process: as `moonlang up`, and gone when this process is.

    url: the public address.
    """

    def __init__(
        self,
        *,
        prefill: int | None = None,
        decode: int | None = None,
        replicas: int | None = None,
        store: bool | str = False,
        name: str | None = None,
        port: int | None = None,
        timeout_s: float = START_S,
        **flags: Any,
    ) -> None:
        """Start it and wait until it is ready.

        store: True, or the memory that each server gives, like "2gb". flags: any of `moonlang serve`, with underscores:
        model_path="...", tp_size=2; True for those without a value; router_policy="random" goes to the router.
        ConfigError when it cannot be started as wanted, PeerError when it does not come up.
        """
        self._name = name or f"py-{os.getpid()}-{secrets.token_hex(3)}"
        given = {"prefill": prefill, "decode": decode, "replicas": replicas, "store": store, "port": port, **flags}
        self._api_key: str = flags.get("api_key") or "none"
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the cluster
        self._process = subprocess.Popen(
            [*_COMMAND, "--plain", "--name", self._name, "--parent", str(os.getpid()), *_words(given)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment(),
            process_group=0,  # a Ctrl-C is for this process, which then ends the cluster
        )
        try:
            self.url = self._wait_ready(timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def client(self) -> Any:
        """An `openai.OpenAI` for the cluster; where openai is not installed an `httpx.Client` with its address."""
        if importlib.util.find_spec("openai") is not None:
            return importlib.import_module("openai").OpenAI(base_url=f"{self.url}/v1", api_key=self._api_key)
        if importlib.util.find_spec("httpx") is not None:
            headers = {"authorization": f"Bearer {self._api_key}"}
            return importlib.import_module("httpx").Client(base_url=self.url, headers=headers, timeout=None)
        raise ConfigError("There is neither openai nor httpx.", hint="Run `pip install openai`.")

    def status(self) -> Status:
        """How it is. PeerError when it has ended."""
        status = self._ask(Order(do="status"), 10.0).status
        assert status is not None
        return status

    def switch(self, server: str, role: str) -> None:
        """Make `server` ("server-1") a "prefill" or "decode" server; returns when it works in its new role."""
        self._ask(Order(do="switch", unit=server, role=role), None)

    def close(self) -> None:
        """End it: requests under way are finished. May be called twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._output.close()

    def _wait_ready(self, timeout_s: float) -> str:
        """The public address."""
        deadline_ns = monotonic_ns() + int(timeout_s * NS_PER_S)
        while True:
            left_s = (deadline_ns - monotonic_ns()) / NS_PER_S
            if self._process.poll() is not None:
                raise self._failure("The cluster does not start.")
            if left_s <= 0:
                raise PeerError(f"The cluster is not ready after {timeout_s:g} s.")
            try:
                status = self._ask(Order(do="wait"), left_s).status
            except PeerError:
                sleep_s(LOOK_S)  # its socket is not there yet, or not any more
                continue
            if status is not None and status.state == "ready":
                return status.url
            sleep_s(LOOK_S)

    def _ask(self, order: Order, timeout_s: float | None) -> Reply:
        return control.ask(directory.folder(self._name), order, timeout_s)

    def _failure(self, text: str) -> ConfigError | PeerError:
        """What it has said, as an error."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _TAIL_BYTES))
        said = self._output.read().decode(errors="replace").rstrip()
        if self._process.returncode == ConfigError.exit_status:
            return ConfigError(said.removeprefix("Error: "))
        return PeerError(f"{text}\n{said}")


_COMMAND = (sys.executable, "-m", "moonlang.cluster.command")


def _words(given: Mapping[str, Any]) -> list[str]:
    """The command line of some flags."""
    words: list[str] = []
    for name, value in given.items():
        if value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, Sequence) and not isinstance(value, str):
            words += [flag, *map(str, value)]
        else:
            words.append(flag if value is True else f"{flag}={value}")
    return words
