"""One server for all end-to-end tests that do not need one of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import LiveServer

FLAGS = (
    *("--enable-metrics", "--enable-cache-report", "--max-total-tokens", "40000", "--random-seed", "1"),
    "--constrained-json-disable-any-whitespace",  # a small model would fill its whole answer with blanks
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("server"), *FLAGS) as running:
        yield running
