"""The prefill half: find decode's Want for each request, compute as always, send the pages as they are computed.

A room is one pair seen from here. Its request waits in PAIRING until the Want has come (which may be first), then runs
like any other. Each plan's rows are laid into pushes: groups of layers while the plan runs when there are enough bytes
to be worth it, the rest when it is committed; pages found in the cache go at once. When the last push has completed the
client and decode are told (Landed), and what was said last is repeated until decode releases the room.

Pages that a push reads stay in the lease, whatever happens to the request, until the push has completed: then, and only
then, is a failed room drained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from moonlang.base.errors import BugError
from moonlang.core import layout
from moonlang.core.kv import unsharded
from moonlang.core.lease import Lease
from moonlang.core.messages import TokenDelta
from moonlang.core.page_key import prompt_key
from moonlang.core.pairing import (
    NO_TOKEN,
    Drained,
    Heard,
    KvCard,
    Landed,
    Lost,
    Noted,
    PairEvent,
    PairMessage,
    Push,
    Pushed,
    Refuse,
    Release,
    Want,
)
from moonlang.core.plan import Row, RowResult
from moonlang.core.request import Finish, Request, State
from moonlang.core.ticket import Completion, Outcome
from moonlang.scheduler.pair_side import Alarm, End, Mail
from moonlang.scheduler.roster import Roster, lease_of
from moonlang.scheduler.settings import PairingConfig, PairStats
from moonlang.scheduler.unclaimed import EarlyWant, Unclaimed

_NS_PER_MS = 1_000_000


@dataclass(slots=True, kw_only=True)
class _Room:
    """One pair. `final`: the last word, Landed or Refuse, after which the request has ended here.

    next_page: pages of the prompt before it are laid into plans, sent, or in decode's cache. pushes: those submitted,
    by the operation's number; sent: those completed, by index. lease: the request's, after its slot is gone.
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
    computed_ns: int = 0
    final: Landed | Refuse | None = None
    released: bool = False
    repeat_ns: int = 0


@dataclass(slots=True)
class _Laid:
    """Pages [first, end) of a room's prompt that a plan in flight completes, and how many of its layers are pushed."""

    room: _Room
    first: int
    end: int
    layers: int = 0


class PrefillSide:
    """See `PairSide` for the methods."""

    def __init__(self, config: PairingConfig, roster: Roster, end: End) -> None:
        self.mail = Mail()
        self._config = config
        self._roster = roster
        self._end = end
        self._regions = config.card.regions
        self._layers = self._regions[0].schema.num_layers
        self._digest = unsharded(self._regions).digest()
        self._page_bytes = sum(region.schema.page_bytes for region in self._regions)
        self._rooms: dict[int, _Room] = {}
        self._unclaimed = Unclaimed(config.most_early, config.patience_ns)
        self._room_of: dict[int, _Room] = {}  # by number of a push under way
        self._laid: dict[int, list[_Laid]] = {}  # by plan
        self._fresh: list[_Room] = []  # computed, but not known whether all is sent
        self._alarm = Alarm()
        self._now_ns = 0
        self._paired = self._pairing_ns = self._moved = self._moving_ns = self._bytes = self._failed = 0

    # ---- requests

    def enter(self, request: Request, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        number = _number(request)
        if number in self._rooms:
            return [self._end(request, _abort(f"Room {number} is in use by another request. Draw a new one."), None)]
        room = _Room(
            request=request,
            number=number,
            key=prompt_key(request.prompt, request.extra_key),
            entered_ns=now_ns,
            deadline_ns=now_ns + self._config.patience_ns,
        )
        self._rooms[number] = room
        self._alarm.set(room.deadline_ns)
        early = self._unclaimed.claim(number)
        if early is None:
            return []
        if isinstance(early, str):
            return [self._fail(room, early)]
        return self._match(room, early.card, early.want, early.heard_ns)

    def leave(self, request: Request, finish: Finish, lease: Lease | None) -> None:
        number = _number(request)
        room = self._rooms.get(number)
        refuse = Refuse(number, finish.message, finish.status)
        if room is None:
            self._bury(refuse)
            return
        if room.request is not request:
            return
        room.lease = lease or room.lease
        if room.final is None:
            self._failed += 1
            if room.card is None:
                del self._rooms[number]
                self._bury(refuse)
                return
            self.mail.cancel(list(room.pushes))
            self._conclude(room, refuse)
        self._settle(room)

    def expire(self, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        if not self._alarm.rings(now_ns):
            return []
        deltas: list[TokenDelta] = []
        for room in list(self._rooms.values()):
            if room.final is None and now_ns >= room.deadline_ns:
                waited = "asked for the pages" if room.want is None else "could be served in time"
                deltas.append(self._fail(room, f"No decode instance {waited} (room {room.number})."))
            self._remind(room)
        for early in self._unclaimed.expire(now_ns):
            error = f"No request came for room {early.want.room}."
            self.mail.send(early.card.instance, Refuse(early.want.room, error))
        if self._unclaimed.next_ns is not None:
            self._alarm.set(self._unclaimed.next_ns)
        return deltas

    def reserve(self, now_ns: int) -> list[TokenDelta]:
        return []

    # ---- plans

    def lay(self, plan_id: int, rows: Sequence[Row]) -> int:
        laid: list[_Laid] = []
        for row in rows:
            request = self._roster.running[row.slot]
            if request.bound:
                laid += self._lay_row(self._rooms[_number(request)], row)
        if not laid:
            return 0
        self._laid[plan_id] = laid
        plan_bytes = sum(part.end - part.first for part in laid) * self._page_bytes
        return max(1, self._layers // self._config.push_groups) if plan_bytes >= self._config.push_least_bytes else 0

    def _lay_row(self, room: _Room, row: Row) -> list[_Laid]:
        """The pages that this row completes; those that the cache has brought are pushed at once."""
        size, end = self._roster.config.page_size, row.start + row.length
        lease_of(room.request).lent = True
        cached = row.start // size
        if room.next_page < cached:
            self._push(room, room.next_page, cached, 0, self._layers)
            room.next_page = cached
        whole = self._roster.memory.pages_for(end) if end == room.request.prompt_len else end // size
        if whole <= room.next_page:
            return []
        first, room.next_page = room.next_page, whole
        return [_Laid(room, first, whole)]

    def progress(self, plan_id: int, layers: int) -> None:
        for part in self._laid.get(plan_id, ()):
            if part.room.final is None and layers > part.layers:
                self._push(part.room, part.first, part.end, part.layers, layers)
                part.layers = layers

    def computed(self, request: Request, outcome: RowResult) -> None:
        room = self._rooms[_number(request)]
        room.lease = self._roster.vacate(request)
        room.outcome = outcome
        room.computed_ns = self._now_ns
        request.state = State.PUSHING
        self._fresh.append(room)

    def committed(self, plan_id: int, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        self.progress(plan_id, self._layers)
        self._laid.pop(plan_id, None)
        fresh, self._fresh = self._fresh, []
        return [delta for room in fresh for delta in self._land(room)]

    def _push(self, room: _Room, first: int, end: int, layer: int, end_layer: int) -> None:
        """Submit pages [first, end) of the prompt, layers [layer, end_layer): an operation for each route and for each
        so many bytes."""
        want, card = room.want, room.card
        if want is None or card is None:
            raise BugError(f"Room {room.number} pushes before anybody has asked for it.")
        lease = room.lease or lease_of(room.request)
        for route in room.routes:
            most = max(1, self._config.push_most_bytes // route.page_bytes(end_layer - layer))
            spans = route.spans(layer, end_layer)
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
                number = self.mail.submit(op)
                room.pushes[number] = Pushed(room.number, room.count, at, stop - begin, spans, 0, route.target)
                room.count += 1
                self._room_of[number] = room

    # ---- what comes back

    def transferred(self, number: int, completion: Completion, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        room = self._room_of.pop(number)
        pushed = room.pushes.pop(number)
        self._bytes += completion.bytes
        if room.final is not None:
            self._settle(room)
            return []
        if completion.outcome is not Outcome.OK:
            return [self._fail(room, f"A transfer of KV pages failed: {completion.error}")]
        pushed = msgspec.structs.replace(pushed, checksum=completion.value)
        room.sent.append(pushed)
        self._send(room, pushed)
        return self._land(room)

    def _land(self, room: _Room) -> list[TokenDelta]:
        """If everything is computed and sent, say so to both sides."""
        outcome = room.outcome
        if outcome is None or room.pushes or room.final is not None:
            return []
        request = room.request
        landed = Landed(
            room=room.number,
            pushes=room.count,
            key=room.key,
            digest=self._digest,
            token=outcome.tokens[0] if outcome.tokens else NO_TOKEN,
            output=outcome.output,
            ended=outcome.ended,
            cached_tokens=request.cached_tokens,
        )
        self._moved += 1
        self._moving_ns += self._now_ns - room.computed_ns
        self._conclude(room, landed)
        return [self._end(request, Finish("length", length=request.output_len), outcome)]

    def heard(self, event: PairEvent, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        match event:
            case Heard(card, Want() as want):
                return self._wanted(card, want)
            case Heard(card, Release() as release):
                return self._released(card, release)
            case Lost(instance, fate):
                return self._lost(instance, gone=fate == "gone")
            case _:  # answers that only a decode instance waits for
                return []

    def _wanted(self, card: KvCard, want: Want) -> list[TokenDelta]:
        room = self._rooms.get(want.room)
        if room is None:
            refusal = self._unclaimed.refusal(want.room)
            if refusal is None:
                self._unclaimed.note(want.room, EarlyWant(card, want, self._now_ns), self._now_ns)
                self._alarm.set(self._now_ns + self._config.patience_ns)
            self.mail.send(card.instance, refusal or Noted(want.room))
            return []
        if room.card is None:
            return self._match(room, card, want, self._now_ns)
        if room.card.instance != card.instance:
            self.mail.send(card.instance, Refuse(want.room, f"Room {want.room} is in use by another pair."))
        elif room.final is None:
            self._send(room, Noted(room.number))
        else:
            self._remind(room, due=True)
        return []

    def _match(self, room: _Room, card: KvCard, want: Want, heard_ns: int) -> list[TokenDelta]:
        """Request and Want are both there."""
        request = room.request
        room.card, room.want = card, want
        error = self._misfit(room, want)
        if error:
            return [self._fail(room, error)]
        room.routes = layout.routes(self._regions, card.regions)
        room.next_page = want.first_page
        room.deadline_ns = heard_ns + want.patience_ms * _NS_PER_MS
        self._alarm.set(room.deadline_ns)
        self._send(room, Noted(room.number))
        self._paired += 1
        self._pairing_ns += self._now_ns - room.entered_ns
        request.state, request.bound = State.WAITING, True
        self._roster.waiting.append(request)
        return []

    def _misfit(self, room: _Room, want: Want) -> str:
        """Why this Want cannot be served; empty when it can."""
        if want.prompt_len != room.request.prompt_len or want.key != room.key:
            return f"Two different requests were sent under room {room.number}. Draw a new room for each."
        pages = self._roster.memory.pages_for(want.prompt_len)
        if not 0 <= want.first_page <= pages or len(want.pages) != pages - want.first_page:
            return f"Room {room.number}: {len(want.pages)} pages after {want.first_page} do not make {pages}."
        card = room.card
        assert card is not None
        most = min(region.num_pages for region in card.regions)
        if not all(0 < page < most for page in want.pages):
            return f"Room {room.number}: a page is wanted outside of decode's pool."
        return layout.mismatch(self._regions, card.regions)

    def _released(self, card: KvCard, release: Release) -> list[TokenDelta]:
        room = self._rooms.get(release.room)
        if room is None:
            if release.error:
                self._unclaimed.note(release.room, release.error, self._now_ns)
                self._alarm.set(self._now_ns + self._config.patience_ns)
            self.mail.send(card.instance, Drained(release.room))
            return []
        if room.card is None:  # decode gives up before it has asked for anything
            self.mail.send(card.instance, Drained(release.room))
            return [self._fail(room, release.error)] if release.error else []
        if room.card.instance != card.instance:
            self.mail.send(card.instance, Drained(release.room))
            return []
        room.released = True
        if room.final is None:
            return [self._fail(room, release.error or "The decode instance wants nothing more.")]
        self._settle(room)
        return []

    def _lost(self, instance: str, *, gone: bool) -> list[TokenDelta]:
        """Nobody answers any more. A silent instance is reminded until the pair's time is up, should it come back."""
        if gone:
            self._unclaimed.forget(instance)
        deltas: list[TokenDelta] = []
        for room in [r for r in self._rooms.values() if r.card is not None and r.card.instance == instance]:
            room.released |= gone
            if room.final is None:
                deltas.append(self._fail(room, "The decode instance is out of reach."))
            else:
                self._settle(room)
        return deltas

    # ---- how a room ends

    def _fail(self, room: _Room, error: str) -> TokenDelta:
        """End the request; `leave` does the rest."""
        return self._end(room.request, _abort(error), None)

    def _conclude(self, room: _Room, final: Landed | Refuse) -> None:
        room.final = final
        self._remind(room, due=True)

    def _remind(self, room: _Room, *, due: bool = False) -> None:
        """Say the last word again when it is time, and forget the room when its time is up."""
        if room.final is None or room.released:
            if room.final is None:
                self._alarm.set(room.deadline_ns)
            return
        if self._now_ns >= room.deadline_ns:
            room.released = True
            self._settle(room)
            return
        if due or self._now_ns >= room.repeat_ns:
            if room.repeat_ns and isinstance(room.final, Landed):
                for pushed in room.sent:
                    self._send(room, pushed)
            self._send(room, room.final)
            room.repeat_ns = self._now_ns + self._config.repeat_ns
        self._alarm.set(room.repeat_ns)

    def _settle(self, room: _Room) -> None:
        """Close the lease of a room whose request has ended once no push reads it; forget it if decode has."""
        if room.pushes or room.final is None:
            return
        if room.lease is not None:
            self._roster.memory.close(room.lease, self._roster.touching(room.request))
            room.lease = None
        if room.released:
            self._send(room, Drained(room.number))
            del self._rooms[room.number]

    def _bury(self, refuse: Refuse) -> None:
        """The request has ended before its Want came, or could be matched."""
        early = self._unclaimed.early(refuse.room)
        if early is not None:
            self.mail.send(early.card.instance, refuse)
        self._unclaimed.note(refuse.room, refuse, self._now_ns)
        self._alarm.set(self._now_ns + self._config.patience_ns)

    def _send(self, room: _Room, body: PairMessage) -> None:
        if room.card is not None:
            self.mail.send(room.card.instance, body)

    # ---- for the scheduler and operators

    @property
    def wake_ns(self) -> int | None:
        return self._alarm.at_ns

    @property
    def leases(self) -> list[Lease]:
        return [room.lease for room in self._rooms.values() if room.lease is not None]

    @property
    def holds_memory(self) -> bool:
        return any(room.lease is not None or room.pushes for room in self._rooms.values())

    def stats(self) -> PairStats:
        rooms = self._rooms.values()
        return PairStats(
            num_pairing=sum(room.card is None for room in rooms),
            num_moving=sum(room.lease is not None for room in rooms),
            num_transfers=len(self._room_of),
            total_paired=self._paired,
            total_pairing_ns=self._pairing_ns,
            total_moved=self._moved,
            total_moving_ns=self._moving_ns,
            total_moved_bytes=self._bytes,
            total_failed=self._failed,
        )


def _number(request: Request) -> int:
    if request.peer is None:
        raise BugError(f"Request {request.rid} has no peer.")
    return request.peer.room


def _abort(error: str, status: int = 503) -> Finish:
    return Finish("abort", message=error, status=status)
