"""A store for `--hicache-storage-backend dynamic` whose faults a test changes while the server runs: a directory whose
reads, writes and answers are as bad as a JSON file says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from moonlang.base import clock
from moonlang.channels.pages import Bytes
from moonlang.storage.channel import Headers, StoreFullError
from moonlang.storage.faulty import Faults, FaultyStore
from moonlang.storage.file import FileStore

_KINDS = {field.name for field in fields(Faults)}


class MoodyStore:
    """extra config: directory, and mood, a file with {"flip": 0.5, "delay_s": 0.1, "full": true, ...}; gate, a named
    pipe: the store opens when a writer has opened and closed it."""

    name = "moody"

    def __init__(self, extra: Mapping[str, Any]) -> None:
        if "gate" in extra:
            Path(extra["gate"]).read_bytes()
        self._mood = Path(extra["mood"])
        self._store = FaultyStore(FileStore(Path(extra["directory"]), 1 << 30), Faults())

    def attach(self, pools: Sequence[Bytes], headers: Headers) -> None:
        self._store.attach(pools, headers)

    def leading(self, names: Sequence[str]) -> int:
        self._feel()
        return self._store.leading(names)

    def read(self, names: Sequence[str], pages: Sequence[int]) -> int:
        self._feel()
        return self._store.read(names, pages)

    def write(self, names: Sequence[str], pages: Sequence[int]) -> int:
        if self._feel().get("full"):
            raise StoreFullError("There is no room.")
        return self._store.write(names, pages)

    def discard(self, names: Sequence[str]) -> None:
        self._store.discard(names)

    def clear(self, prefix: str) -> None:
        self._store.clear(prefix)

    def close(self) -> None:
        self._store.close()

    def _feel(self) -> dict[str, Any]:
        mood: dict[str, Any] = json.loads(self._mood.read_text())
        faults = {name: value for name, value in mood.items() if name in _KINDS}
        self._store.faults = Faults(**faults)
        clock.sleep_s(mood.get("delay_s", 0.0))
        return mood
