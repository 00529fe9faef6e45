"""The end of a pair at its decode instance: the peer is told until it answers, pages are in quarantine till then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moonlang.core.pairing import Drained, KvCard, Landed, PairMessage, Refuse, Release
from moonlang.mem_cache.leases import Leases
from moonlang.scheduler.pair_side import Alarm, Mail


@dataclass(slots=True, kw_only=True)
class Parting:
    """A pair whose request is served or lost. pages: what the peer may still write to; verifies: operations that read
    them. until_ns: when to stop asking if no page depends on the answer."""

    room: int
    serial: int
    instance: str
    error: str
    pages: list[int]
    verifies: list[int]
    until_ns: int
    drained: bool = False
    repeat_ns: int = 0


class Partings:
    """Says Release until the peer is drained, or its process is gone; frees the pages then, and not before.

    room in partings: whether the room's last pair is not quite over.
    """

    def __init__(self, memory: Leases, mail: Mail, alarm: Alarm, repeat_ns: int) -> None:
        self._memory = memory
        self._mail = mail
        self._alarm = alarm
        self._repeat_ns = repeat_ns
        self._rooms: dict[int, Parting] = {}

    def __contains__(self, room: int) -> bool:
        return room in self._rooms

    @property
    def num_pages(self) -> int:
        """Pages in quarantine."""
        return sum(len(parting.pages) for parting in self._rooms.values())

    def add(self, parting: Parting, now_ns: int) -> None:
        self._rooms[parting.room] = parting
        self._say(parting, now_ns)

    def heard(self, card: KvCard, body: PairMessage, now_ns: int) -> None:
        """A message of a pair that has ended here, or was never known."""
        parting = self._rooms.get(body.room)
        if parting is None or parting.instance != card.instance or parting.serial != body.serial:
            if isinstance(body, Landed | Refuse):
                self._mail.send(card.instance, Release(body.room, "This room is not known here.", body.serial))
        elif isinstance(body, Drained):
            parting.drained = True
            self._settle(parting)
        elif isinstance(body, Landed | Refuse):
            self._say(parting, now_ns)

    def verified(self, room: int, number: int) -> None:
        """An operation that read pages in quarantine has ended."""
        parting = self._rooms[room]
        parting.verifies.remove(number)
        self._settle(parting)

    def lost(self, instance: str, *, gone: bool) -> None:
        """An instance is out of reach. What a silent one may still write to stays in quarantine."""
        for parting in self._of(instance):
            parting.drained |= gone
            self._settle(parting)

    def expire(self, now_ns: int) -> None:
        """Say again what has not been answered: for ever where pages depend on it."""
        for parting in list(self._rooms.values()):
            if parting.drained:
                continue
            if not parting.pages and now_ns >= parting.until_ns:
                parting.drained = True
                self._settle(parting)
            elif now_ns >= parting.repeat_ns:
                self._say(parting, now_ns)
            else:
                self._alarm.set(parting.repeat_ns)

    def _say(self, parting: Parting, now_ns: int) -> None:
        if not parting.drained:
            self._mail.send(parting.instance, Release(parting.room, parting.error, parting.serial))
            parting.repeat_ns = now_ns + self._repeat_ns
            self._alarm.set(parting.repeat_ns)

    def _settle(self, parting: Parting) -> None:
        """Once nobody writes to the pages nor reads them they are free."""
        if parting.drained and not parting.verifies:
            self._memory.acquit(parting.pages)
            del self._rooms[parting.room]

    def _of(self, instance: str) -> Sequence[Parting]:
        return [parting for parting in self._rooms.values() if parting.instance == instance]
