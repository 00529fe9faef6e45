"""Pairs of endpoints of every messaging backend, with the far end in another process, to be measured side by side."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from moonlang.base.errors import BugError, PeerError
from moonlang.core.messages import Control, Envelope, Message, Ready, Reply, StopHit
from moonlang.core.ports import Endpoint
from moonlang.messaging.codec import Codec
from moonlang.messaging.inproc import Hub, InprocEndpoint
from moonlang.messaging.zmq import ZmqEndpoint
from moonlang.mooncake.endpoint import MooncakeEndpoint

NEAR, FAR = "near", "far"
_WAIT_NS = 1 << 62
_START_NS = 20 * 10**9

KINDS = {
    "pyzmq": "PUSH/PULL over ipc:// and the codec, nothing else: the yardstick",
    "zmq": "--messaging-backend zmq",
    "mooncake": "--messaging-backend mooncake, within a host",
    "inproc": "--messaging-backend inproc, between two threads",
    "pyzmq-tcp": "the yardstick between hosts",
    "zmq-tcp": "zmq over TCP, as between hosts",
    "mooncake-te": "--messaging-backend mooncake between hosts: over the transfer engine",
}
BETWEEN_HOSTS = ("pyzmq-tcp", "zmq-tcp", "mooncake-te")


class Mailbox(Protocol):
    """What is measured of an Endpoint."""

    def send(self, to: str, body: Message) -> None: ...

    def recv(self) -> list[Envelope]: ...

    def wait(self, timeout_ns: int) -> None: ...

    def close(self) -> None: ...


class PlainZmq:
    """The least that can be done with pyzmq: two sockets, blocking calls, the same codec."""

    def __init__(self, name: str, addresses: dict[str, str]) -> None:
        self._name = name
        self._codec = Codec()
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(addresses[name])
        self._outbox = self._context.socket(zmq.PUSH)
        (other,) = (address for peer, address in addresses.items() if peer != name)
        self._outbox.connect(other)

    def send(self, to: str, body: Message) -> None:
        self._outbox.send(self._codec.encode(Envelope(to, self._name, 0, body)))

    def recv(self) -> list[Envelope]:
        return [self._codec.decode(self._inbox.recv())]

    def wait(self, timeout_ns: int) -> None:
        """`recv` blocks."""

    def close(self) -> None:
        self._context.destroy(linger=0)


class _Plan(msgspec.Struct):
    kind: str
    addresses: dict[str, str]


def _open(kind: str, name: str, addresses: dict[str, str]) -> Mailbox:
    match kind:
        case "pyzmq" | "pyzmq-tcp":
            return PlainZmq(name, addresses)
        case "zmq" | "zmq-tcp":
            return ZmqEndpoint(name, addresses)
        case "mooncake" | "mooncake-te":
            return MooncakeEndpoint(name, addresses)
    raise BugError(f"There is no mailbox {kind!r}.")


def answer(mailbox: Mailbox) -> None:
    """The far end: sends back Replies with id 0, swallows the others, says how many at a Control, ends at a StopHit."""
    swallowed = 0
    mailbox.send(NEAR, Ready(FAR, 0))
    while True:
        mailbox.wait(_WAIT_NS)
        for envelope in mailbox.recv():
            body = envelope.body
            if isinstance(body, Reply):
                if body.id == 0:
                    mailbox.send(NEAR, body)
                else:
                    swallowed += 1
            elif isinstance(body, Control):
                mailbox.send(NEAR, Reply(swallowed, True))
                swallowed = 0
            elif isinstance(body, StopHit):
                return


def one(mailbox: Mailbox) -> Message:
    """The next message."""
    while True:
        mailbox.wait(_START_NS)
        if found := mailbox.recv():
            return found[0].body


@contextmanager
def pair(kind: str, folder: Path, ports: Callable[[], int]) -> Iterator[Mailbox]:
    """The near end of a pair whose far end answers; see `answer`."""
    if kind == "inproc":
        with _threads() as mailbox:
            yield mailbox
        return
    addresses = {
        name: f"tcp://127.0.0.1:{ports()}" if kind in BETWEEN_HOSTS else f"ipc://{folder}/{kind}-{name}"
        for name in (NEAR, FAR)
    }
    plan = folder / f"{kind}.json"
    plan.write_bytes(msgspec.json.encode(_Plan(kind, addresses)))
    mailbox = _open(kind, NEAR, addresses)
    child = subprocess.Popen([sys.executable, "-m", __name__, str(plan)])
    try:
        if not isinstance(one(mailbox), Ready):
            raise PeerError(f"The far end of {kind} did not start.")
        yield mailbox
        mailbox.send(FAR, StopHit("end"))
        child.wait(10)
    finally:
        child.kill()
        child.wait()
        mailbox.close()


@contextmanager
def _threads() -> Iterator[Endpoint]:
    hub = Hub((NEAR, FAR))
    near, far = InprocEndpoint(NEAR, hub), InprocEndpoint(FAR, hub)
    thread = threading.Thread(target=answer, args=(far,), daemon=True)
    thread.start()
    try:
        one(near)
        yield near
        near.send(FAR, StopHit("end"))
        thread.join(10)
    finally:
        hub.close()


if __name__ == "__main__":
    found = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=_Plan)
    box = _open(found.kind, FAR, found.addresses)
    answer(box)
    box.close()
