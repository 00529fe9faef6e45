"""The part of the scheduler role that a prefill or decode instance has on top: link and transfers around the brain.

Each step passes on what link and transfers have to say, and at its end carries out what the brain has left in its mail.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from moonlang.base import checksum, registry
from moonlang.base.clock import NS_PER_S
from moonlang.config.server_args import ServerArgs
from moonlang.core.kv import KvRegion
from moonlang.core.messages import Generate, TokenDelta
from moonlang.core.pairing import KvCard
from moonlang.core.ports import KvTransfer
from moonlang.core.ticket import Ticket
from moonlang.disaggregation.channel import TransferOptions
from moonlang.disaggregation.frames import TOKEN_VARIABLE
from moonlang.disaggregation.link import LinkOptions, TcpLink
from moonlang.disaggregation.peers import Reach
from moonlang.roles.pair_watch import PairWatch
from moonlang.scheduler.pair_side import PairSide
from moonlang.scheduler.settings import PairingConfig

_INSTANCE_BYTES = 16

OpenTransfer = Callable[[TransferOptions], KvTransfer]


@dataclass(frozen=True, slots=True)
class Outfit:
    """What an instance needs before its brain can be made: its transfer engine, and its card for others."""

    transfer: KvTransfer
    card: KvCard
    reach: Reach
    sums: str


def equip(args: ServerArgs, regions: Sequence[KvRegion]) -> Outfit:
    """Register the pools of all ranks with the transfer backend. ConfigError when that cannot work here."""
    reach = Reach()
    checked = args.disaggregation_enable_kv_checksum and args.disaggregation_transfer_backend != "fake"
    devices = args.disaggregation_ib_device or ""
    options = TransferOptions(host=args.host, devices=devices, checksum=checked, linked=reach)
    backend: OpenTransfer = registry.find("disaggregation", args.disaggregation_transfer_backend).BACKEND
    transfer = backend(options)
    card = transfer.register(regions, secrets.token_hex(_INSTANCE_BYTES))
    return Outfit(transfer, card, reach, checksum.METHOD if checked else "off")


def pairing_config(args: ServerArgs, outfit: Outfit) -> PairingConfig:
    """The brain's part of the arguments."""
    default = PairingConfig(mode="prefill", card=outfit.card)
    extra = args.disaggregation_decode_extra_slots
    return PairingConfig(
        mode=cast(Literal["prefill", "decode"], args.disaggregation_mode),
        card=outfit.card,
        patience_ns=int(args.disaggregation_timeout_s * NS_PER_S),
        verify=outfit.sums != "off",
        fallback=args.disaggregation_decode_fallback,
        push_groups=args.disaggregation_layer_groups,
        extra_leases=default.extra_leases if extra is None else extra,
    )


class Pairing:
    """Owns link and transfer of one instance."""

    def __init__(self, args: ServerArgs, outfit: Outfit, side: PairSide) -> None:
        """ConfigError when the host cannot be listened on."""
        self._side = side
        self._card = outfit.card
        self._transfer = outfit.transfer
        self._prefills = args.disaggregation_mode == "prefill"
        options = LinkOptions(
            role=args.disaggregation_mode,
            host=args.host,
            token=os.environ.get(TOKEN_VARIABLE, ""),
            sums=outfit.sums,
        )
        self._link = TcpLink(outfit.card, options, outfit.reach)
        self._numbers: dict[Ticket, int] = {}
        self._tickets: dict[int, Ticket] = {}
        self._progress = (0, 0)
        self._watch = PairWatch(outfit.card, prefills=self._prefills)
        self.wait_fds = (self._link.fileno(), self._transfer.fileno())

    @property
    def route(self) -> dict[str, Any]:
        """What a bootstrap server is told of this instance: who it is and where its link listens."""
        host, port = self._link.address
        return {"instance": self._card.instance, "host": host, "port": port}

    def begin(self, message: Generate, now_ns: int) -> None:
        """A request has come: at a prefill instance decode may look for it."""
        if message.peer is not None:
            self._watch.begun(message.peer.room, now_ns)
            if self._prefills:
                self._link.claim(message.peer.room)

    def take(self, progress: tuple[int, int], now_ns: int) -> list[TokenDelta]:
        """Tell the brain what has happened. progress: of the executor."""
        deltas: list[TokenDelta] = []
        if progress != self._progress:
            self._progress = progress
            self._side.progress(*progress)
        for event in self._link.recv():
            self._watch.heard(event, now_ns)
            deltas += self._side.heard(event, now_ns)
        if self._numbers:
            for completion in self._transfer.poll():
                number = self._numbers.pop(completion.ticket)
                del self._tickets[number]
                self._watch.completed(number, completion, now_ns)
                deltas += self._side.transferred(number, completion, now_ns)
        return deltas

    def report(self) -> dict[str, Any]:
        """What metrics want to know beyond the brain's own numbers."""
        return self._watch.report()

    def carry_out(self, now_ns: int) -> None:
        """Do what the brain wants done."""
        mail = self._side.mail
        for spec, deadline_ns in mail.opens():
            self._link.open(spec, deadline_ns)
        for instance, message in mail.outgoing():
            self._watch.sent(message, now_ns)
            self._link.send(instance, message)
        for number, op in mail.transfers():
            self._watch.submitted(number, op, now_ns)
            ticket = self._transfer.submit(op)
            self._numbers[ticket], self._tickets[number] = number, ticket
        for number in mail.cancels():
            if number in self._tickets:
                self._transfer.cancel(self._tickets[number])

    def close(self) -> None:
        self._transfer.close()
        self._link.close()
