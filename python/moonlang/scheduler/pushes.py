"""Which pages of which plan are pushed when: groups of layers while a plan runs, the rest when it is committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moonlang.base.errors import BugError
from moonlang.core import layout
from moonlang.core.kv import unsharded
from moonlang.core.lease import Lease
from moonlang.core.pairing import KvCard, Landed, Push, Pushed, Refuse, Want
from moonlang.core.plan import Row, RowResult
from moonlang.core.request import Request
from moonlang.scheduler.pair_side import Mail
from moonlang.scheduler.roster import lease_of
from moonlang.scheduler.settings import PairingConfig


@dataclass(slots=True, kw_only=True)
class Room:
    """One pair, seen from its prefill instance. `final`: the last word, after which the request has ended here.

    next_page: pages of the prompt before it are laid into plans, sent, or in decode's cache. pushes: those under way,
    by the operation's number; sent: those completed; count: how many there have been. lease: the request's, once its
    slot is gone.
    """

    request: Request
    number: int
    key: bytes
    entered_ns: int
    deadline_ns: int
    card: KvCard | None = None
    want: Want | None = None
    routes: tuple[layout.Route, ...] = ()
    next_page: int = 0
    pushes: dict[int, Pushed] = field(default_factory=dict)
    sent: list[Pushed] = field(default_factory=list)
    count: int = 0
    lease: Lease | None = None
    outcome: RowResult | None = None
    matched_ns: int = 0
    computed_ns: int = 0
    final: Landed | Refuse | None = None
    released: bool = False
    repeat_ns: int = 0

    @property
    def serial(self) -> int:
        """Number of the pair at its decode instance, 0 before that has spoken."""
        return self.want.serial if self.want is not None else 0


@dataclass(slots=True)
class _Laid:
    """Pages [first, end) of a room's prompt that a plan in flight completes, and how many of its layers are pushed."""

    room: Room
    first: int
    end: int
    layers: int = 0


class Pushes:
    """Turns rows into Push operations. len(pushes): how many are under way."""

    def __init__(self, config: PairingConfig, page_size: int, mail: Mail) -> None:
        self._config = config
        self._page_size = page_size
        self._mail = mail
        self._layers = unsharded(config.card.regions).num_layers
        self._page_bytes = sum(region.schema.page_bytes for region in config.card.regions)
        schema = config.card.regions[0].schema
        layer_bytes = schema.page_bytes // schema.num_layers
        self._group = max(1, self._layers // config.push_groups, -(-config.push_span_bytes // layer_bytes))
        self._room_of: dict[int, Room] = {}  # by number of the operation
        self._laid: dict[int, list[_Laid]] = {}  # by plan

    def __len__(self) -> int:
        return len(self._room_of)

    def lay(self, plan_id: int, rows: Sequence[tuple[Room, Row]]) -> int:
        """A plan with these rows is made; returns after every how many layers it is to report, 0 for never."""
        laid = [part for room, row in rows for part in self._lay_row(room, row)]
        if not laid:
            return 0
        self._laid[plan_id] = laid
        plan_bytes = sum(part.end - part.first for part in laid) * self._page_bytes
        return self._group if plan_bytes >= self._config.push_least_bytes else 0

    def _lay_row(self, room: Room, row: Row) -> list[_Laid]:
        """The pages that this row completes; those that the cache has brought are pushed at once."""
        size, end = self._page_size, row.start + row.length
        cached = row.start // size
        if room.next_page < cached:
            self._push(room, room.next_page, cached, 0, self._layers)
            room.next_page = cached
        whole = -(-end // size) if end == room.request.prompt_len else end // size
        if whole <= room.next_page:
            return []
        first, room.next_page = room.next_page, whole
        return [_Laid(room, first, whole)]

    def progress(self, plan_id: int, layers: int) -> None:
        """The first `layers` layers of a plan in flight are written."""
        for part in self._laid.get(plan_id, ()):
            if part.room.final is None and layers > part.layers:
                self._push(part.room, part.first, part.end, part.layers, layers)
                part.layers = layers

    def committed(self, plan_id: int) -> None:
        """A plan is done: what it has computed and not yet pushed goes now."""
        self.progress(plan_id, self._layers)
        self._laid.pop(plan_id, None)

    def done(self, number: int) -> tuple[Room, Pushed]:
        """Operation `number` has ended."""
        room = self._room_of.pop(number)
        pushed = room.pushes.pop(number)
        lease = room.lease or room.request.lease
        if lease is not None:
            lease.lent = bool(room.pushes)
        return room, pushed

    def _push(self, room: Room, first: int, end: int, layer: int, end_layer: int) -> None:
        """Submit pages [first, end) of the prompt, layers [layer, end_layer): an operation for each route and for each
        so many bytes."""
        want, card = room.want, room.card
        if want is None or card is None:
            raise BugError(f"Room {room.number} pushes before anybody has asked for it.")
        lease = room.lease or lease_of(room.request)
        lease.lent = True
        for route in room.routes:
            spans = route.spans(layer, end_layer)
            if not spans:
                continue  # a stage without these layers
            most = max(1, self._config.push_most_bytes // route.page_bytes(layer, end_layer))
            for begin in range(first, end, most):
                stop, at = min(end, begin + most), begin - want.first_page
                op = Push(
                    room=room.number,
                    peer=card,
                    source=tuple(lease.pages[begin:stop]),
                    target=want.pages[at : at + stop - begin],
                    spans=spans,
                    deadline_ns=room.deadline_ns,
                    source_rank=route.source,
                    target_rank=route.target,
                )
                number = self._mail.submit(op)
                room.pushes[number] = Pushed(
                    room=room.number,
                    index=room.count,
                    at=at,
                    count=stop - begin,
                    spans=spans,
                    checksum=0,
                    rank=route.target,
                    serial=want.serial,
                )
                room.count += 1
                self._room_of[number] = room
