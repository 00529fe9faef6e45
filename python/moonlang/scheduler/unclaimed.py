"""What a prefill instance remembers of rooms that are not, or not any more, in its hands: bounded in every way."""

from __future__ import annotations

from dataclasses import dataclass

from moonlang.core.pairing import KvCard, Refuse, Want


@dataclass(frozen=True, slots=True)
class EarlyWant:
    """A Want whose request has not come yet."""

    card: KvCard
    want: Want
    heard_ns: int


@dataclass(frozen=True, slots=True)
class _Entry:
    body: EarlyWant | Refuse | str
    until_ns: int


class Unclaimed:
    """Rooms of which only one side has spoken: a Want that came early, a Refuse for the Want of a request that has
    ended before it came, or why decode has given up before the request came. The end of a room is never replaced by a
    Want, which can only be a late one. Beyond `most` rooms the oldest is forgotten.
    """

    def __init__(self, most: int, patience_ns: int) -> None:
        self._most = most
        self._patience_ns = patience_ns
        self._rooms: dict[int, _Entry] = {}  # by age

    @property
    def next_ns(self) -> int | None:
        """When the oldest word is to be forgotten."""
        return next(iter(self._rooms.values())).until_ns if self._rooms else None

    def note(self, room: int, body: EarlyWant | Refuse | str, now_ns: int) -> EarlyWant | None:
        """Keep `body` as the last word about `room`; returns the Want that had to make place for it."""
        self._rooms.pop(room, None)
        dropped = None
        if len(self._rooms) >= self._most:
            dropped = self._rooms.pop(next(iter(self._rooms))).body
        self._rooms[room] = _Entry(body, now_ns + self._patience_ns)
        return dropped if isinstance(dropped, EarlyWant) else None

    def early(self, room: int) -> EarlyWant | None:
        """The Want that waits for the request of `room`."""
        entry = self._rooms.get(room)
        return entry.body if entry is not None and isinstance(entry.body, EarlyWant) else None

    def end(self, room: int) -> Refuse | None:
        """The answer to a Want for `room`, if the room has come to an end without it."""
        entry = self._rooms.get(room)
        if entry is None or isinstance(entry.body, EarlyWant):
            return None
        return entry.body if isinstance(entry.body, Refuse) else Refuse(room, entry.body)

    def claim(self, room: int) -> EarlyWant | str | None:
        """The request of `room` has come: the Want that waits for it, or why decode has given up, or None."""
        entry = self._rooms.pop(room, None)
        return None if entry is None or isinstance(entry.body, Refuse) else entry.body

    def forget(self, instance: str) -> None:
        """An instance is gone: so are its Wants."""
        for room in list(self._rooms):
            early = self.early(room)
            if early is not None and early.card.instance == instance:
                del self._rooms[room]

    def expire(self, now_ns: int) -> list[EarlyWant]:
        """Forget what is too old; returns the Wants among it."""
        stale: list[EarlyWant] = []
        while self._rooms:
            room, entry = next(iter(self._rooms.items()))
            if entry.until_ns > now_ns:
                break
            del self._rooms[room]
            if isinstance(entry.body, EarlyWant):
                stale.append(entry.body)
        return stale


class Released:
    """The newest pair that a decode instance has released in each room. Its pages are given away by then, so a copy of
    its Want that is still on its way must not be served. Beyond `most` rooms the oldest is forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._serials: dict[tuple[str, int], int] = {}  # by age

    def note(self, instance: str, room: int, serial: int) -> None:
        """`instance` has released the pair `serial`."""
        serial = max(serial, self._serials.pop((instance, room), 0))
        if len(self._serials) >= self._most:
            del self._serials[next(iter(self._serials))]
        self._serials[instance, room] = serial

    def covers(self, instance: str, room: int, serial: int) -> bool:
        """Whether this pair has been released."""
        return 0 < serial <= self._serials.get((instance, room), 0)
