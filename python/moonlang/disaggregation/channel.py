"""What all KvTransfers share: tickets, a lane per peer, cancels, deadlines, completions. A backend is a `Mover`.

A lane is a thread that carries out the ops to one peer in order; one that hangs holds up nobody else. It ends when it
has had nothing to do for a while. Verifying what has landed here has a lane of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moonlang.base.clock import monotonic_ns
from moonlang.base.errors import BugError, PeerError
from moonlang.base.process_memory import host_key
from moonlang.core.kv import KvRegion
from moonlang.core.pairing import KvCard, Push, TransferOp, Verify
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.disaggregation import page_memory

_IDLE_S = 60.0  # a lane without work for so long ends; it also closes what it holds of its peer
_CLOSE_S = 5.0  # how long `close` waits for work that is under way
_HERE = ""  # the lane of what concerns no peer


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """What a backend is told once.

    host: the address that this instance advertises to its peers. devices: --disaggregation-ib-device. checksum: take
    checksums. linked: whether the control connection to an instance stands; may be asked from any thread.
    """

    host: str
    devices: str = ""
    checksum: bool = True
    linked: Callable[[str], bool] = lambda instance: True


class Contact(NamedTuple):
    """How peers reach one region: what the backend dials, and what a process of the same host needs ("": neither)."""

    session: str = ""
    handle: str = ""


class StoppedError(Exception):
    """Raised by `Work.go_on` in the middle of an op that is not to go on."""

    def __init__(self, outcome: Outcome, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


class Work:
    """One op under way."""

    def __init__(self, ticket: Ticket, op: TransferOp, linked: Callable[[str], bool]) -> None:
        self.ticket = ticket
        self.op = op
        self.started = False
        self.cancelled = False
        self._linked = linked

    @property
    def lane(self) -> str:
        return self.op.peer.instance if isinstance(self.op, Push) else _HERE

    def go_on(self) -> None:
        """To be called before each slice is sent. StoppedError: cancelled, too late, or the peer is out of reach."""
        if self.cancelled:
            raise StoppedError(Outcome.CANCELLED, "The transfer was cancelled.")
        if isinstance(self.op, Push):
            if monotonic_ns() >= self.op.deadline_ns:
                raise StoppedError(Outcome.FAILED, "The transfer did not end within its time limit.")
            if not self._linked(self.op.peer.instance):
                raise StoppedError(Outcome.FAILED, "The decode instance is out of reach.")


class Mover(Protocol):
    """What a backend does. `push` and `forget` run in the lane of the peer, the other methods in the caller's."""

    name: str

    def register(self, regions: Sequence[KvRegion], instance: str) -> Sequence[Contact]:
        """Make the pools known; how peers reach each. ConfigError when that cannot be done here."""
        ...

    def push(self, push: Push, work: Work) -> int:
        """Move the bytes, slice by slice, and return their checksum (0 when none is wanted).

        On return all of them are in the peer's memory, and on an exception none of them is under way any more.
        PeerError or StoppedError when they are not all there.
        """
        ...

    def forget(self, instance: str) -> None:
        """Close what is held of a peer; it may come back."""
        ...

    def close(self) -> None: ...


class TransferChannel:
    """A KvTransfer around a Mover. Owned by one thread."""

    def __init__(self, mover: Mover, options: TransferOptions) -> None:
        self._mover = mover
        self._options = options
        self._regions: Sequence[KvRegion] = ()
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._open: dict[int, Work] = {}
        self._done: deque[Completion] = deque()
        self._broken: BaseException | None = None
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._next = 0

    def register(self, regions: Sequence[KvRegion], instance: str) -> KvCard:
        if self._regions:
            raise BugError("KvTransfer.register was called twice.")
        self._regions = regions
        contacts = self._mover.register(regions, instance)
        return KvCard(
            instance=instance,
            backend=self._mover.name,
            host=host_key(),
            regions=tuple(regions),
            sessions=tuple(contact.session for contact in contacts),
            handles=tuple(contact.handle for contact in contacts),
        )

    def submit(self, op: TransferOp) -> Ticket:
        ticket = Ticket(self._next, self._mover.name)
        self._next += 1
        work = Work(ticket, op, self._options.linked)
        with self._lock:
            self._open[ticket.id] = work
            lane = self._lanes.get(work.lane)
            if lane is None:
                lane = self._lanes[work.lane] = _Lane(work.lane, self)
            lane.put(work)
        return ticket

    def poll(self) -> Sequence[Completion]:
        """See Channel.poll. Raises what a backend has raised that is no failure of a transfer, which is fatal."""
        if self._broken is not None:
            raise self._broken
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        found: list[Completion] = []
        while self._done:
            found.append(self._done.popleft())
        return sorted(found, key=lambda completion: completion.ticket.id)

    def cancel(self, ticket: Ticket) -> None:
        with self._lock:
            work = self._open.get(ticket.id)
            if work is None:
                return
            work.cancelled = True
            if work.started or not self._lanes[work.lane].withdraw(work):
                return  # its lane sees the mark
        self._complete(work, Outcome.CANCELLED, "The transfer was cancelled.")

    def fileno(self) -> int:
        return self._event

    def close(self) -> None:
        """Stop what is under way and wait for it, within reason. May be called twice."""
        if self._event < 0:
            return
        with self._lock:
            for work in self._open.values():
                work.cancelled = True
            lanes = list(self._lanes.values())
            for lane in lanes:
                lane.stop()
        for lane in lanes:
            lane.thread.join(_CLOSE_S)
        self._mover.close()
        with self._lock:
            os.close(self._event)
            self._event = -1

    # ---- in the lanes

    def carry_out(self, work: Work) -> None:
        """Do one op and complete its ticket, whatever happens."""
        op = work.op
        try:
            work.go_on()
            value = self._mover.push(op, work) if isinstance(op, Push) else self._verify(op)
        except StoppedError as stopped:
            self._complete(work, stopped.outcome, str(stopped))
        except PeerError as error:
            self._complete(work, Outcome.FAILED, str(error))
        except BaseException as error:  # noqa: BLE001 - handed over to the polling thread, which raises it
            self._broken = error
            self._announce()
        else:
            pages = op.source if isinstance(op, Push) else op.pages
            size = len(pages) * sum(span.size for span in op.spans)
            self._complete(work, Outcome.OK, count=len(pages), size=size, value=value)

    def retire(self, lane: _Lane) -> bool:
        """Let an idle lane go; False when it has got work meanwhile."""
        with self._lock:
            if lane.busy:
                return False
            self._lanes.pop(lane.instance, None)
        return True

    def forget(self, instance: str) -> None:
        if instance != _HERE:
            self._mover.forget(instance)

    def _verify(self, verify: Verify) -> int:
        if not self._options.checksum:
            return 0
        return page_memory.checksum(self._regions[verify.rank], verify.pages, verify.spans)

    def _complete(
        self, work: Work, outcome: Outcome, error: str = "", *, count: int = 0, size: int = 0, value: int = 0
    ) -> None:
        with self._lock:
            self._open.pop(work.ticket.id, None)
            self._done.append(Completion(work.ticket, outcome, count, size, error, value))
        self._announce()

    def _announce(self) -> None:
        """`poll` has something."""
        with self._lock:
            if self._event >= 0:  # else closed; a lane that hung has come back
                os.eventfd_write(self._event, 1)


class _Lane:
    """The thread of one peer. All methods but `_run` are called under the channel's lock."""

    def __init__(self, instance: str, channel: TransferChannel) -> None:
        self.instance = instance
        self._channel = channel
        self._queue: deque[Work | None] = deque()
        self._ready = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name=f"kv-{instance[:8] or 'verify'}", daemon=True)
        self.thread.start()

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def put(self, work: Work | None) -> None:
        self._queue.append(work)
        self._ready.release()

    def withdraw(self, work: Work) -> bool:
        """Take work back that has not begun; False when it has."""
        try:
            self._queue.remove(work)
        except ValueError:
            return False
        return True

    def stop(self) -> None:
        """Finish what is under way and end."""
        self.put(None)

    def _run(self) -> None:
        while True:
            if not self._ready.acquire(timeout=_IDLE_S):
                if self._channel.retire(self):
                    break
                continue
            try:
                work = self._queue.popleft()
            except IndexError:
                continue  # it was withdrawn
            if work is None:
                break
            work.started = True
            self._channel.carry_out(work)
        self._channel.forget(self.instance)
