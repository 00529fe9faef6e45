"""Stores come and go in the background: nobody waits for them, and who asked is always answered."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from moonlang.base.clock import NS_PER_S
from moonlang.base.errors import ConfigError
from moonlang.core.ports import KvStore
from moonlang.roles.store_slot import StoreSlot
from moonlang.storage.channel import StoreChannel, StoreOptions
from moonlang.storage.null import NullStore

LATE_NS = 60 * NS_PER_S


class Closable(NullStore):
    """Says when it has been closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


@dataclass
class Bench:
    """A slot, what its callers were told, and a store whose opening takes until `may_open`."""

    epoll: select.epoll = field(default_factory=select.epoll)
    may_open: threading.Event = field(default_factory=threading.Event)
    told: list[tuple[bool, str]] = field(default_factory=list)
    opened: list[Closable] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.slot = StoreSlot(self.epoll)

    def open(self) -> KvStore:
        assert self.may_open.wait(90)
        if self.error is not None:
            raise self.error
        self.opened.append(Closable())
        return StoreChannel(self.opened[-1], StoreOptions(model="m"))

    def tell(self, good: bool, error: str) -> None:
        self.told.append((good, error))

    def attach(self) -> None:
        self.slot.attach("null", self.open, self.tell, 0)

    def settle(self) -> bool:
        """Until nothing is going on any more; whether a store has come into use."""
        came = False
        while self.slot.is_changing:
            assert self.epoll.poll(20), "nothing has happened"
            came |= self.slot.step(0, at_work=False)
        return came


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench()
    yield found
    found.may_open.set()
    found.slot.close()
    found.epoll.close()


def test_a_store_is_opened_in_the_background(bench: Bench) -> None:
    bench.attach()
    assert not bench.slot.step(0, at_work=False)
    assert not bench.slot.is_usable
    with pytest.raises(ConfigError, match="attached or detached"):
        bench.attach()
    bench.may_open.set()
    assert bench.settle()
    assert bench.slot.is_usable
    assert (bench.slot.name, bench.told) == ("null", [(True, "")])
    with pytest.raises(ConfigError, match="Detach it first"):
        bench.attach()


def test_one_that_cannot_be_opened_says_why(bench: Bench) -> None:
    bench.error = ConfigError("No Mooncake service answers.")
    bench.may_open.set()
    bench.attach()
    assert not bench.settle()
    assert [good for good, _ in bench.told] == [False]
    assert "No Mooncake service answers" in bench.told[0][1]
    assert (bench.slot.name, bench.slot.is_usable) == ("", False)
    bench.error = None
    bench.attach()
    assert bench.settle()


def test_one_that_comes_too_late_is_closed_again(bench: Bench) -> None:
    bench.attach()
    assert bench.slot.wake_ns() < LATE_NS
    bench.slot.step(LATE_NS, at_work=False)
    assert [good for good, _ in bench.told] == [False]
    bench.may_open.set()
    assert not bench.settle()
    assert bench.opened[0].closed.is_set()
    assert len(bench.told) == 1
    assert not bench.slot.is_usable
    bench.attach()
    assert bench.settle()


def test_a_store_leaves_when_its_work_is_done(bench: Bench) -> None:
    bench.may_open.set()
    bench.attach()
    bench.settle()
    bench.slot.detach(bench.tell, 0)
    bench.slot.step(0, at_work=True)
    assert not bench.slot.is_usable
    assert len(bench.told) == 1
    assert not bench.opened[0].closed.is_set()
    bench.slot.step(0, at_work=False)
    bench.settle()
    assert bench.opened[0].closed.is_set()
    assert bench.told[1:] == [(True, "")]
    with pytest.raises(ConfigError, match="No store"):
        bench.slot.detach(bench.tell, 0)


def test_who_waits_for_one_that_hangs_is_told(bench: Bench) -> None:
    bench.may_open.set()
    bench.attach()
    bench.settle()
    bench.slot.detach(bench.tell, 0)
    bench.slot.step(LATE_NS, at_work=True)
    assert [good for good, _ in bench.told] == [True, False]
    bench.slot.step(LATE_NS, at_work=False)
    bench.settle()
    assert bench.opened[0].closed.is_set()
