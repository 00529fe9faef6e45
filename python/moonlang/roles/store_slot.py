"""The place for a store, which may be filled and emptied while the server runs.

Opening a store takes a third of a second, or half a minute when somebody does not answer, and closing one up to a
second: both are done in a thread, and the scheduler goes on meanwhile.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Sequence

from moonlang.base import log
from moonlang.base.clock import NS_PER_S
from moonlang.base.errors import ConfigError
from moonlang.base.wakeup import Wakeup
from moonlang.core.ports import KvStore
from moonlang.core.storage import StoreOp
from moonlang.core.ticket import Completion, Ticket
from moonlang.roles.role import NEVER_NS

_log = log.get(__name__)

_PATIENCE_NS = 50 * NS_PER_S  # who asked for it is answered by then; less than the API server waits

OpenStore = Callable[[], KvStore]
Told = Callable[[bool, str], None]  # (whether it has worked, why not)


class _Job:
    """Something done once, in a thread. `fileno` is readable when it has ended."""

    def __init__(self, work: Callable[[], KvStore | None], name: str) -> None:
        self.store: KvStore | None = None
        self.error = ""
        self._work = work
        self._ended = Wakeup()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._ended.is_set

    def fileno(self) -> int:
        return self._ended.fileno()

    def close(self) -> None:
        self._ended.close()

    def _run(self) -> None:
        try:
            self.store = self._work()
        except Exception as error:  # noqa: BLE001 - libraries and classes of users raise anything
            self.error = str(error) or type(error).__name__
        self._ended.set()


class StoreSlot:
    """At most one store. `epoll` is told what to wait for; `step` is to be called when it fires and at `wake_ns`."""

    def __init__(self, epoll: select.epoll) -> None:
        self.name = ""
        self._epoll = epoll
        self._store: KvStore | None = None
        self._is_leaving = False
        self._job: _Job | None = None
        self._told: Told | None = None
        self._deadline_ns = NEVER_NS

    @property
    def is_usable(self) -> bool:
        """Whether ops may be submitted."""
        return self._store is not None and not self._is_leaving

    @property
    def store(self) -> KvStore | None:
        """What is there, be it on its way out."""
        return self._store

    def put(self, name: str, store: KvStore) -> None:
        """Fill the place at once."""
        self._epoll.register(store.fileno(), select.EPOLLIN)
        self._store, self.name = store, name

    def submit(self, op: StoreOp) -> Ticket:
        assert self._store is not None
        return self._store.submit(op)

    def poll(self) -> Sequence[Completion]:
        return self._store.poll() if self._store is not None else ()

    def attach(self, name: str, opener: OpenStore, told: Told, now_ns: int) -> None:
        """Begin to open a store; `told` hears whether it is in use. ConfigError when there is one already."""
        self._refuse_two()
        if self._store is not None:
            raise ConfigError(f"The store {self.name} is attached.", hint="Detach it first.")
        self._begin(opener, f"open-{name}", told, now_ns)
        self.name = name

    def detach(self, told: Told, now_ns: int) -> None:
        """Begin to let go of the store: nothing is submitted any more, and it is closed when what is under way has
        ended. `told` hears of it. ConfigError when there is none."""
        self._refuse_two()
        if self._store is None or self._is_leaving:
            raise ConfigError("No store is attached.")
        self._is_leaving = True
        self._told, self._deadline_ns = told, now_ns + _PATIENCE_NS

    def step(self, now_ns: int, *, at_work: bool) -> bool:
        """Go on. at_work: ops are under way. Whether a store has come into use."""
        if self._is_leaving and self._store is not None and not at_work:
            self._epoll.unregister(self._store.fileno())
            self._start(self._closing(self._store), f"close-{self.name}")
            self._store, self._is_leaving = None, False
        came = self._job is not None and self._job.is_done and self._end(self._job)
        if self._told is not None and now_ns >= self._deadline_ns:
            self._tell(False, f"It has not ended within {_PATIENCE_NS // NS_PER_S} s, and goes on in the background.")
        return came

    @property
    def is_changing(self) -> bool:
        """Whether `step` may have something to do."""
        return self._job is not None or self._is_leaving

    def wake_ns(self) -> int:
        """When who waits is to be told that it takes too long."""
        return self._deadline_ns if self._told is not None else NEVER_NS

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    # ---- inside

    def _refuse_two(self) -> None:
        if self._job is not None or self._is_leaving:
            raise ConfigError("A store is being attached or detached.", hint="Try again when that has ended.")

    def _begin(self, work: Callable[[], KvStore | None], name: str, told: Told, now_ns: int) -> None:
        self._told, self._deadline_ns = told, now_ns + _PATIENCE_NS
        self._start(work, name)

    def _start(self, work: Callable[[], KvStore | None], name: str) -> None:
        self._job = _Job(work, name)
        self._epoll.register(self._job.fileno(), select.EPOLLIN)

    def _end(self, job: _Job) -> bool:
        """The job has ended. Whether it has brought a store that is still wanted."""
        self._epoll.unregister(job.fileno())
        job.close()
        self._job = None
        if job.store is None:
            self.name = ""
            self._tell(not job.error, job.error)
            return False
        if self._told is None:  # who wanted it was told that it had taken too long
            self._start(self._closing(job.store), f"close-{self.name}")
            return False
        self.put(self.name, job.store)
        _log.info("KV store %s: it is attached.", self.name)
        self._tell(True, "")
        return True

    @staticmethod
    def _closing(store: KvStore) -> Callable[[], None]:
        return store.close

    def _tell(self, good: bool, error: str) -> None:
        if self._told is not None:
            told, self._told = self._told, None
            told(good, error)
