"""One transfer engine of Mooncake, with what it does not do by itself.

What measuring the wheel showed, and where it is handled:
- calls before `initialize` are segmentation faults, calls in a forked child hang: an `Engine` is initialised or is not
  there, and `_alive` refuses other processes;
- the blocking calls burn a core, and asking about a handle that has ended crashes: single submits, each asked in turn
  until its end, asleep in between (`_Flights`);
- what is submitted cannot be taken back, and its source is read until its end: nothing returns before all has ended;
- a queue of more than 2,048 entries fails, and what follows with it: fewer are in flight;
- the first contact with a stopped process hangs for a minute and holds up all first contacts and submits of its engine:
  a scout goes first (`contact`);
- a successor behind a peer's address is taken for the peer, and the first write to it fails: before anything is
  written, and after anything has failed, the peer's tag is read; then a failed write is tried once more;
- the name of a process that crashed stays in the metadata server, which refuses it: every engine has a new name;
- on a host with RDMA cards it uses them whatever the protocol says: `_prepare_environment`.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moonlang.base import log
from moonlang.base.clock import NS_PER_MS, NS_PER_S, monotonic_ns, sleep_s
from moonlang.base.errors import BugError, ConfigError, PeerError
from moonlang.mooncake import lib
from moonlang.mooncake.config import MooncakeConfig
from moonlang.mooncake.contact import Contacts, Verdict
from moonlang.mooncake.wheel import DONE, FAILED, NO_HANDLES, PENDING, Wheel

MAX_ENTRY_BYTES: Final = 4 << 20  # callers cut what they write into entries of at most so many bytes
MAX_FLIGHT_BYTES: Final = 32 << 20  # of one write at a time; the rest waits
MAX_FLIGHTS: Final = 256  # entries of one write at a time; the library refuses more than 2,048
CONTACT_NS: Final = 3 * NS_PER_S  # a peer that does not answer for so long is out of reach
STALL_NS: Final = 30 * NS_PER_S  # without an end of any entry; the library's own time limits are far shorter
SETTLE_NS: Final = 200 * NS_PER_MS  # for what is left of a broken connection in the peer's socket buffer
RETRY_NS: Final = NS_PER_S  # between two attempts to reach a metadata server
MIN_PORTS: Final = 16  # of one process: an engine takes two, and a crash blocks them for a minute

Words = NDArray[np.uint64]
_log = log.get(__name__)


class Peer:
    """Another engine, as a lane of this one sees it. session: see `Engine.session`."""

    def __init__(self, session: str, tag: bytes) -> None:
        """PeerError when this is no session."""
        self.name, _, address = session.rpartition("@")
        self.tag = tag
        try:
            self.tag_address = int(address, 16)
        except ValueError as error:
            raise PeerError(f"{session!r} is no session of a transfer engine.") from error
        self.known = False  # its tag has been read, and nothing has failed since


class Engine:
    """An initialised engine. Its methods may be called from any thread."""

    def __init__(
        self,
        config: MooncakeConfig,
        new_wheel: Callable[[], Wheel] = lib.transfer_engine,
        *,
        contact_ns: int = CONTACT_NS,
    ) -> None:
        """ConfigError when it cannot be initialised. While a metadata server does not answer, it is not initialised
        yet and tries again: servers may be started in any order."""
        self._config = config
        self._new_wheel = new_wheel
        self._pid = os.getpid()
        self._regions: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._ready = threading.Event()
        self._contact_ns = contact_ns
        self._contacts = Contacts(self._scout)
        self._prepare_environment()
        self._unique = self._new_name()
        self._wheel: Wheel | None = (wheel := new_wheel())
        if self._initialize(wheel, self._unique):
            self._ready.set()
            self._announce()
        elif config.metadata_kind == "p2p":
            text = f"Mooncake's transfer engine cannot listen on {config.local_hostname} ({config.protocol})."
            raise ConfigError(text, hint="See the lines of the library above; MC_MIN_RPC_PORT and MC_MAX_RPC_PORT.")
        else:
            _log.warning("The metadata server %s does not answer; trying on.", config.metadata_server)
            threading.Thread(target=self._keep_trying, name="mooncake-init", daemon=True).start()

    @property
    def name(self) -> str:
        """What peers dial."""
        if self._config.metadata_kind == "p2p":
            return f"{self._config.local_hostname}:{self._alive().get_rpc_port()}"
        return self._unique

    def session(self, tag_address: int) -> str:
        """What a peer needs to know: the name, and where in this process the tag lies that proves who answers."""
        return f"{self.name}@{tag_address:x}"

    def register(self, address: int, size: int) -> None:
        """Let peers read and write `size` bytes at `address`, which must stay where they are until `close`."""
        with self._lock:
            self._regions[address] = size
            if self._ready.is_set():
                _register(self._alive(), address, size)

    def write(self, peer: Peer, source: Words, target: Words, sizes: Words, go_on: Callable[[], None]) -> None:
        """Write sizes[i] bytes at source[i] to target[i] of the peer; arrays: [n].

        Blocks, asleep. `go_on` is called before every entry and raises to stop. On return everything has arrived; on
        an exception nothing is under way any more. PeerError: out of reach, restarted, or it refused twice.
        """
        left = np.arange(len(sizes))
        for _ in range(2):
            self._meet(peer, go_on)
            flights = _Flights(self._alive(), peer.name)
            try:
                left = left[flights.run(source[left], target[left], sizes[left], go_on)]
            finally:
                peer.known = not flights.failed
                if flights.stopped:
                    self._settle(peer)
            if not len(left):
                return
        self._settle(peer)
        raise PeerError(f"The peer {peer.name} does not take {len(left)} of {len(sizes)} writes.")

    def unregister(self, address: int) -> None:
        """The end of `register`; nothing may be under way any more."""
        with self._lock:
            if self._regions.pop(address, None) is not None and self._wheel is not None and self._ready.is_set():
                self._wheel.unregister_memory(address)

    def reach(self, peer: Peer) -> None:
        """Before the first `submit`: PeerError unless the one that was meant answers."""
        self._meet(peer, lambda: None)

    def submit(self, peer: Peer, source: int, target: int, size: int) -> int:
        """Begin one write of at most MAX_ENTRY_BYTES and return its handle. PeerError: it did not even begin.

        For small writes that are waited for by other means. The caller has few under way, asks for the `status` of
        each until its end, and leaves the source as it is until then.
        """
        handle = self._alive().transfer_submit_write(peer.name, source, target, size)
        if handle in NO_HANDLES:
            raise PeerError(f"The peer {peer.name} does not take a write.")
        return handle

    def status(self, handle: int) -> int:
        """PENDING, or how a write that was submitted has ended; not to be asked again then."""
        status = self._alive().transfer_check_status(handle)
        return FAILED if status not in (PENDING, DONE) else status

    def close(self) -> None:
        """Let go of memory and library, which takes it up to a second, and many where a metadata server is gone."""
        if os.getpid() != self._pid:
            return
        self._closed.set()
        self._contacts.close()
        with self._lock:
            wheel, self._wheel = self._wheel, None
            if wheel is not None and self._ready.is_set() and self._config.metadata_kind == "p2p":
                for address in self._regions:  # elsewhere this would wait for the server, once for each
                    wheel.unregister_memory(address)
            self._regions.clear()

    def _alive(self) -> Wheel:
        if os.getpid() != self._pid:
            raise BugError("A transfer engine was taken along into a forked process.")
        wheel = self._wheel
        if wheel is None:
            raise PeerError("The transfer engine is closed.")
        if not self._ready.is_set():
            raise PeerError(f"The metadata server {self._config.metadata_server} does not answer.")
        return wheel

    def _meet(self, peer: Peer, go_on: Callable[[], None]) -> None:
        """PeerError unless the one that was meant answers."""
        wheel = self._alive()
        if peer.known:
            return
        verdict = self._contacts.meet(peer.name, peer.tag_address, peer.tag, wheel, self._contact_ns, go_on)
        if verdict is not Verdict.MET:
            raise PeerError(f"The peer {peer.name} {verdict.value}.")
        peer.known = True

    def _settle(self, peer: Peer) -> None:
        """Before the end of a write that failed in part: what broken connections left in the peer's socket buffers
        lands while it answers. One that is gone takes nothing any more; of one that is silent nothing can be known."""
        if peer.known:
            return
        with suppress(PeerError):
            self._meet(peer, lambda: None)
            sleep_s(SETTLE_NS / NS_PER_S)

    def _initialize(self, wheel: Wheel, name: str) -> bool:
        config = self._config
        local = config.local_hostname if config.metadata_kind == "p2p" else name
        return wheel.initialize(local, config.metadata_server, config.protocol, config.device_name) == 0

    def _keep_trying(self) -> None:
        while not self._closed.wait(RETRY_NS / NS_PER_S):
            wheel = self._new_wheel()  # one whose initialisation failed is good for nothing
            if not self._initialize(wheel, self._unique):
                continue
            with self._lock:
                if self._closed.is_set():
                    return
                for address, size in self._regions.items():
                    _register(wheel, address, size)
                self._wheel = wheel
                self._ready.set()
            _log.info("The metadata server %s answers.", self._config.metadata_server)
            self._announce()
            return

    def _scout(self) -> Wheel:
        """A second engine, for first contacts."""
        wheel = self._new_wheel()
        if not self._initialize(wheel, self._new_name()):
            raise PeerError("No further transfer engine can be started.")
        return wheel

    def _new_name(self) -> str:
        return f"{self._config.local_hostname}-{secrets.token_hex(8)}"

    def _prepare_environment(self) -> None:
        """What the library reads when an engine is made."""
        if self._config.protocol == "tcp":
            os.environ["MC_FORCE_TCP"] = "1"
        if self._config.metadata_kind != "p2p":  # else it registers the first address of the machine that it finds
            os.environ.setdefault("MC_TCP_BIND_ADDRESS", self._config.local_hostname)
        low, high = os.environ.get("MC_MIN_RPC_PORT", ""), os.environ.get("MC_MAX_RPC_PORT", "")
        if low.isdigit() and high.isdigit() and int(high) - int(low) + 1 < MIN_PORTS:
            text = f"MC_MIN_RPC_PORT={low} to MC_MAX_RPC_PORT={high} are fewer than {MIN_PORTS} ports."
            hint = "A process takes four, and after a crash they stay taken for a minute."
            raise ConfigError(text, hint=hint)

    def _announce(self) -> None:
        _log.warning(
            "Mooncake's transfer engine %s (%s) listens on all interfaces; who reaches it can read and write the KV "
            "memory: keep its ports (MC_MIN_RPC_PORT to MC_MAX_RPC_PORT, by default 15000 to 17000) behind a firewall.",
            self.name,
            self._config.protocol,
        )


class _Flights:
    """Entries of one write under way. failed: some did not arrive. stopped: by an exception, after some had failed."""

    def __init__(self, wheel: Wheel, peer: str) -> None:
        self.failed = False
        self.stopped = False
        self._wheel = wheel
        self._peer = peer
        self._flying: dict[int, int] = {}  # handle -> entry
        self._bytes = 0
        self._moved_ns = monotonic_ns()  # when an entry took off or ended

    def run(self, source: Words, target: Words, sizes: Words, go_on: Callable[[], None]) -> list[int]:
        """Write all entries; those that did not arrive. A failure or `go_on` stops it, when what flies has ended."""
        left: list[int] = []
        following = 0
        try:
            while (following < len(sizes) and not self.failed) or self._flying:
                while following < len(sizes) and not self.failed and self._has_room(int(sizes[following])):
                    go_on()
                    entry = int(source[following]), int(target[following]), int(sizes[following])
                    if not self._take_off(following, *entry):
                        left.append(following)
                    following += 1
                left += self._land(sizes)
        except BaseException:
            while self._flying:
                self._land(sizes)
            self.stopped = self.failed
            raise
        return sorted([*left, *range(following, len(sizes))])

    def _has_room(self, size: int) -> bool:
        return not self._flying or (len(self._flying) < MAX_FLIGHTS and self._bytes + size <= MAX_FLIGHT_BYTES)

    def _take_off(self, entry: int, source: int, target: int, size: int) -> bool:
        handle = self._wheel.transfer_submit_write(self._peer, source, target, size)
        if handle in NO_HANDLES:
            self.failed = True
            return False
        self._flying[handle] = entry
        self._bytes += size
        self._moved_ns = monotonic_ns()
        return True

    def _land(self, sizes: Words) -> list[int]:
        """Ask each once; entries that failed. Sleeps when none has ended. PeerError: the library has lost them."""
        before, failed = len(self._flying), []
        for handle, entry in list(self._flying.items()):
            status = self._wheel.transfer_check_status(handle)
            if status not in (DONE, FAILED):
                self.failed |= status != PENDING
                continue
            del self._flying[handle]
            self._bytes -= int(sizes[entry])
            if status == FAILED:
                self.failed = True
                failed.append(entry)
        if len(self._flying) < before:
            self._moved_ns = monotonic_ns()
        elif before:
            if monotonic_ns() - self._moved_ns > STALL_NS:
                self._flying.clear()
                self.failed = True
                raise PeerError(f"The transfer engine has lost {before} writes to {self._peer}.")
            sleep_s(self._nap_s())
        return failed

    def _nap_s(self) -> float:
        """A quarter of the time that what flies takes at 4 GB/s, in [50 us, 2 ms]."""
        return min(max(self._bytes / 16e9, 50e-6), 2e-3)


def _register(wheel: Wheel, address: int, size: int) -> None:
    code = wheel.register_memory(address, size)
    if code != 0:
        raise ConfigError(f"Mooncake does not register {size} bytes of memory: error {code}.")
