"""A process in virtual time: it runs, is stopped (SIGSTOP) and goes on, or is dead."""

from __future__ import annotations

from collections.abc import Callable

from moonlang.sim.agenda import Agenda


class Process:
    """Everything that a server does or is sent goes through `after`: a stopped one does it late, a dead one never."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        self._held: list[Callable[[], None]] = []
        self.stopped = False
        self.dead = False
        self.stops = 0  # how often it has been stopped: names the present stop

    @property
    def now_ns(self) -> int:
        return self._agenda.now_ns

    @property
    def responds(self) -> bool:
        return not (self.stopped or self.dead)

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        self._agenda.at(self._agenda.now_ns + delay_ns, lambda: self._fire(action))

    def stop(self) -> None:
        self.stopped = True
        self.stops += 1

    def resume(self) -> None:
        """Go on with what would have happened meanwhile, in that order."""
        self.stopped = False
        held, self._held = self._held, []
        for action in held:
            self._fire(action)

    def kill(self) -> None:
        self.dead = True
        self._held.clear()

    def _fire(self, action: Callable[[], None]) -> None:
        if self.stopped:
            self._held.append(action)
        elif not self.dead:
            action()
