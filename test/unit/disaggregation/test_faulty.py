"""The fault wrapper plants what it was told to, the same on every run."""

from __future__ import annotations

import select
from collections import Counter

from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.pairing import Verify
from moonlang.core.ticket import Completion, Outcome
from moonlang.disaggregation.channel import TransferOptions
from moonlang.disaggregation.fake import open_transfer
from moonlang.disaggregation.faulty import Faults, FaultyTransfer

SCHEMA = KvSchema(num_layers=1, num_kv_heads=1, head_dim=1, page_size=1, dtype="float32", itemsize=4)
OPS = 200


def run(faults: Faults) -> tuple[FaultyTransfer, list[Completion]]:
    transfer = FaultyTransfer(open_transfer(TransferOptions(host="127.0.0.1")), faults)
    transfer.register([KvRegion(address=0, stride=SCHEMA.page_bytes, num_pages=0, schema=SCHEMA)], "a")
    found: list[Completion] = []
    for _ in range(OPS):
        transfer.submit(Verify(room=0, pages=(), spans=()))
    while len(found) < OPS:
        assert select.select([transfer.fileno()], [], [], 5)[0], "silent with tickets to come"
        found += transfer.poll()
    assert transfer.poll() == []
    transfer.close()
    transfer.close()
    return transfer, found


def test_every_ticket_completes_once_with_its_fate() -> None:
    transfer, found = run(Faults(seed=3, refuse=0.2, spoil=0.2, delay=0.2))
    assert sorted(done.ticket.id for done in found) == list(range(OPS))
    outcomes = Counter(done.outcome for done in found)
    assert outcomes == {Outcome.FAILED: transfer.refused + transfer.spoilt, Outcome.OK: OPS - outcomes[Outcome.FAILED]}
    assert min(transfer.refused, transfer.spoilt, transfer.delayed) > OPS / 20


def test_the_seed_decides() -> None:
    fates = [{done.ticket.id: done.outcome for done in run(Faults(seed=seed, refuse=0.5))[1]} for seed in (1, 1, 2)]
    assert fates[0] == fates[1] != fates[2]
