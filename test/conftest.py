"""What holds for every test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from leftovers import Leftovers


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """When all is over, no process, folder or shared memory of a server is there any more."""
    tmp_path_factory.getbasetemp()  # chosen before other temporary files go elsewhere
    with pytest.MonkeyPatch.context() as patch:
        leftovers = Leftovers(patch)
        yield
        leftovers.check()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A test that configures the log, as every engine does, changes nothing for the next one."""
    logger = logging.getLogger("moonlang")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
