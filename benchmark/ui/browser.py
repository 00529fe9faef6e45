"""Headless Chromium, driven over the DevTools protocol with nothing but aiohttp: for tests, figures and pictures."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from moonlang.base import clock

T = TypeVar("T")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WHY_NOT = "Chromium is not installed (Debian: apt-get install chromium)"
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--force-prefers-reduced-motion", "--enable-precise-memory-info"),
)
_START_S = 90.0
_CALL_S = 90.0
_KEYS = {  # name: virtual key code, text
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    " ": (32, " "),
}


class Browser:
    """One browser process."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM, WHY_NOT
        self._runner = asyncio.Runner()
        profile = folder / "profile"
        profile.mkdir(parents=True)
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                [CHROMIUM, *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(folder)},  # it is killed, and cleans up nothing
                start_new_session=True,
            )
        try:
            self._wire = self._runner.run(_Wire.opened(profile / "DevToolsActivePort"))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._wire.close())
        self._end()

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A page that knows nothing of those before it."""
        context = self._runner.run(self._wire.call("Target.createBrowserContext", {}))["browserContextId"]
        try:
            yield self._runner.run(self._attached(context))
        finally:
            self._runner.run(self._wire.call("Target.disposeBrowserContext", {"browserContextId": context}))

    def _end(self) -> None:
        self._runner.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    async def _attached(self, context: str) -> Page:
        place = {"url": "about:blank", "browserContextId": context}
        target = await self._wire.call("Target.createTarget", place)
        found = await self._wire.call("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        self._wire.problems.clear()
        page = Page(self._runner, self._wire, found["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            await self._wire.call(f"{domain}.enable", {}, found["sessionId"])
        return page


class Page:
    """What a user sees and does. `problems`: errors that the page has logged, blocked resources among them."""

    def __init__(self, runner: asyncio.Runner, wire: _Wire, session: str) -> None:
        self._runner = runner
        self._wire = wire
        self._session = session

    @property
    def problems(self) -> list[str]:
        return self._wire.problems

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Any call of the protocol."""
        return self._run(self._wire.call(method, parameters, self._session))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression or promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str, timeout_s: float = 90) -> Any:
        """Wait until an expression is true; its value."""
        deadline_ns = clock.monotonic_ns() + int(timeout_s * clock.NS_PER_S)
        while not (found := self.evaluate(expression)):
            assert clock.monotonic_ns() < deadline_ns, f"not within {timeout_s} s: {expression}; {self.problems}"
            clock.sleep_s(0.02)
        return found

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys by their names, one after the other."""
        for key in keys:
            code, text = _KEYS[key]
            event: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def set_scheme(self, scheme: str) -> None:
        """light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def controls(self) -> list[tuple[str, str]]:
        """(role, name) of everything that can take the focus, as a screen reader hears it."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
            and any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", ()))
        ]

    def heap_bytes(self) -> int:
        """Memory of the page's objects after a collection."""
        self.call("HeapProfiler.collectGarbage")
        return self.call("Runtime.getHeapUsage")["usedSize"]

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(work, _CALL_S))


class _Wire:
    """The connection: calls with answers, and a note of what goes wrong in the page."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._session = session
        self._socket = socket
        self._numbers = itertools.count(1)
        self.problems: list[str] = []

    @classmethod
    async def opened(cls, port_file: Path) -> _Wire:
        async with asyncio.timeout(_START_S):
            while not (port_file.exists() and port_file.read_text().count("\n")):
                await asyncio.sleep(0.02)
        port, path = port_file.read_text().split("\n")[:2]
        session = aiohttp.ClientSession()
        return cls(session, await session.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0))

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": session} if session else {}))
        while True:
            found = json.loads(await self._socket.receive_str())
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self._note(found)

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded" if found["entry"]["level"] == "error":
                self.problems.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "assert"):
                self.problems.append(str([one.get("value") for one in found["args"]]))
