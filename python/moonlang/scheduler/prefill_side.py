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

import msgspec

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
    Refuse,
    Release,
    Want,
)
from moonlang.core.plan import Row, RowResult
from moonlang.core.request import Finish, Request, State
from moonlang.core.ticket import Completion, Outcome
from moonlang.scheduler.pair_side import Alarm, End, Mail, peer_of, room_in_use
from moonlang.scheduler.pushes import Pushes, Room
from moonlang.scheduler.roster import Roster
from moonlang.scheduler.settings import NS_PER_MS, PairingConfig, PairStats
from moonlang.scheduler.unclaimed import EarlyWant, Released, Unclaimed


class PrefillSide:
    """See `PairSide` for the methods."""

    def __init__(self, config: PairingConfig, roster: Roster, end: End) -> None:
        self.mail = Mail()
        self._config = config
        self._roster = roster
        self._end = end
        self._regions = config.card.regions
        self._digest = unsharded(self._regions).digest()
        self._pushes = Pushes(config, roster.config.page_size, self.mail)
        self._rooms: dict[int, Room] = {}
        self._unclaimed = Unclaimed(config.most_early, config.patience_ns)
        self._past = Released(config.most_early)
        self._fresh: list[Room] = []  # computed, but not known whether all is sent
        self._alarm = Alarm()
        self._now_ns = 0
        self._paired = self._pairing_ns = self._moved = self._moving_ns = self._bytes = self._failed = 0

    # ---- requests

    def enter(self, request: Request, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        number = peer_of(request).room
        if number in self._rooms:
            return [self._end(request, room_in_use(number), None)]
        room = Room(
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
        number = peer_of(request).room
        room = self._rooms.get(number)
        if room is None:
            self._bury(Refuse(number, finish.message, finish.status))
            return
        if room.request is not request:
            return
        refuse = Refuse(number, finish.message, finish.status, room.serial)
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
            if now_ns < room.deadline_ns:
                self._remind(room)
            elif room.final is None:
                waited = "asked for the pages" if room.want is None else "could be served in time"
                deltas.append(self._fail(room, f"No decode instance {waited} (room {room.number})."))
            else:  # decode's patience is at an end too
                room.released = True
                self._settle(room)
        for early in self._unclaimed.expire(now_ns):
            self._refuse(early, f"No request came for room {early.want.room}.")
        if self._unclaimed.next_ns is not None:
            self._alarm.set(self._unclaimed.next_ns)
        return deltas

    def reserve(self, now_ns: int) -> list[TokenDelta]:
        return []

    # ---- plans

    def lay(self, plan_id: int, rows: Sequence[Row]) -> int:
        running = self._roster.running
        bound = [(running[row.slot], row) for row in rows if running[row.slot].bound]
        return self._pushes.lay(plan_id, [(self._rooms[peer_of(request).room], row) for request, row in bound])

    def progress(self, plan_id: int, layers: int) -> None:
        self._pushes.progress(plan_id, layers)

    def computed(self, request: Request, outcome: RowResult) -> None:
        room = self._rooms[peer_of(request).room]
        room.lease = self._roster.vacate(request)
        room.outcome = outcome
        request.state = State.PUSHING
        self._fresh.append(room)

    def committed(self, plan_id: int, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        for room in self._fresh:
            room.computed_ns = now_ns
        self._pushes.committed(plan_id)
        fresh, self._fresh = self._fresh, []
        return [delta for room in fresh for delta in self._land(room)]

    # ---- what comes back

    def transferred(self, number: int, completion: Completion, now_ns: int) -> list[TokenDelta]:
        self._now_ns = now_ns
        room, pushed = self._pushes.done(number)
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

    def _land(self, room: Room) -> list[TokenDelta]:
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
            serial=room.serial,
            host_tokens=request.host_tokens,
            storage_tokens=request.storage_tokens,
            tier_miss=request.tier_miss,
            queue_ns=request.admitted_ns - room.matched_ns,
            compute_ns=room.computed_ns - request.admitted_ns,
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
        if self._past.covers(card.instance, want.room, want.serial):
            self._refuse(EarlyWant(card, want, self._now_ns), f"Room {want.room} has been released.")
        elif room is None:
            self._keep(card, want)
        elif room.card is None:
            return self._match(room, card, want, self._now_ns)
        elif room.card.instance != card.instance or room.serial != want.serial:
            self._refuse(EarlyWant(card, want, self._now_ns), f"Room {want.room} is in use by another pair.")
        elif room.final is None:
            self._send(room, Noted(room.number, room.serial))
        else:
            self._remind(room, due=True)
        return []

    def _keep(self, card: KvCard, want: Want) -> None:
        """A Want without a request: it may come, or have ended already."""
        early = EarlyWant(card, want, self._now_ns)
        end = self._unclaimed.end(want.room)
        if end is not None:
            self._refuse(early, end.error, end.status)
            return
        self._note(want.room, early)
        self.mail.send(card.instance, Noted(want.room, want.serial))

    def _match(self, room: Room, card: KvCard, want: Want, heard_ns: int) -> list[TokenDelta]:
        """Request and Want are both there."""
        request = room.request
        room.card, room.want = card, want
        error = self._misfit(room, want)
        if error:
            return [self._fail(room, error)]
        room.routes = layout.routes(self._regions, card.regions)
        room.next_page = want.first_page
        room.deadline_ns = heard_ns + want.patience_ms * NS_PER_MS
        self._alarm.set(room.deadline_ns)
        self._send(room, Noted(room.number, room.serial))
        self._paired += 1
        self._pairing_ns += self._now_ns - room.entered_ns
        room.matched_ns = self._now_ns
        request.state, request.bound = State.WAITING, True
        self._roster.waiting.append(request)
        return []

    def _misfit(self, room: Room, want: Want) -> str:
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
        again = self._past.covers(card.instance, release.room, release.serial)
        self._past.note(card.instance, release.room, release.serial)
        room = self._rooms.get(release.room)
        if room is not None and room.card is not None:
            if room.card.instance == card.instance and room.serial == release.serial:
                room.released = True
                if room.final is None:
                    return [self._fail(room, release.error or "The decode instance wants nothing more.")]
                self._settle(room)
                return []
        elif release.error and not again:  # decode gives up before it has asked for anything, or its Want is heard
            if room is not None:
                self.mail.send(card.instance, Drained(release.room, release.serial))
                return [self._fail(room, release.error)]
            self._note(release.room, release.error)
        self.mail.send(card.instance, Drained(release.room, release.serial))
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

    def _fail(self, room: Room, error: str) -> TokenDelta:
        """End the request; `leave` does the rest."""
        return self._end(room.request, Finish("abort", message=error, status=503), None)

    def _conclude(self, room: Room, final: Landed | Refuse) -> None:
        room.final = final
        self._remind(room, due=True)

    def _remind(self, room: Room, *, due: bool = False) -> None:
        """Say the last word again when it is time, and with it what came before."""
        if self._now_ns < room.deadline_ns:
            self._alarm.set(room.deadline_ns)
        if room.final is None or room.released:
            return
        if due or self._now_ns >= room.repeat_ns:
            if room.repeat_ns and isinstance(room.final, Landed):
                for pushed in room.sent:
                    self._send(room, pushed)
            self._send(room, room.final)
            room.repeat_ns = self._now_ns + self._config.repeat_ns
        self._alarm.set(room.repeat_ns)

    def _settle(self, room: Room) -> None:
        """Once no push reads the pages of a request that has ended they are let go; the room is forgotten if decode
        has nothing to say of it any more."""
        if room.pushes or room.final is None:
            return
        if room.lease is not None:
            request, memory, touching = room.request, self._roster.memory, self._roster.touching(room.request)
            if room.outcome is not None:
                memory.share(room.lease, request.prompt, request.prompt_len, request.extra_key, touching)
            memory.close(room.lease, touching)
            room.lease = None
        if room.released:
            self._send(room, Drained(room.number, room.serial))
            del self._rooms[room.number]

    def _bury(self, refuse: Refuse) -> None:
        """The request has ended before its Want came, or could be matched."""
        early = self._unclaimed.early(refuse.room)
        if early is not None:
            self._refuse(early, refuse.error, refuse.status)
        self._note(refuse.room, refuse)

    def _note(self, number: int, body: EarlyWant | Refuse | str) -> None:
        dropped = self._unclaimed.note(number, body, self._now_ns)
        if dropped is not None:
            self._refuse(dropped, "Too many requests wait for their other half.")
        self._alarm.set(self._now_ns + self._config.patience_ns)

    def _refuse(self, early: EarlyWant, error: str, status: int = 503) -> None:
        """Answer a Want that no room takes up."""
        self.mail.send(early.card.instance, Refuse(early.want.room, error, status, early.want.serial))

    def _send(self, room: Room, body: PairMessage) -> None:
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
            num_transfers=len(self._pushes),
            total_paired=self._paired,
            total_pairing_ns=self._pairing_ns,
            total_moved=self._moved,
            total_moving_ns=self._moving_ns,
            total_moved_bytes=self._bytes,
            total_failed=self._failed,
        )
