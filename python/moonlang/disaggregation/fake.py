"""Transfer that moves nothing: every push is complete as soon as it is begun, and its checksum is 0.

For measuring and testing what surrounds transfers. A decode instance then continues from whatever lies in its pages:
its text means nothing. Both instances must use this backend, which the handshake sees to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moonlang.core.kv import KvRegion
from moonlang.core.pairing import Push
from moonlang.disaggregation.channel import Contact, TransferChannel, TransferOptions, Work


class NothingMover:
    """See channel.Mover."""

    name = "fake"

    def register(self, regions: Sequence[KvRegion], instance: str) -> Sequence[Contact]:
        return [Contact() for _ in regions]

    def push(self, push: Push, work: Work) -> int:
        work.go_on()
        return 0

    def forget(self, instance: str) -> None:
        """Nothing is held of a peer."""

    def close(self) -> None:
        """Nothing is held at all."""


def open_transfer(options: TransferOptions) -> TransferChannel:
    """The KvTransfer of this backend."""
    return TransferChannel(NothingMover(), dataclasses.replace(options, checksum=False))


BACKEND = open_transfer
