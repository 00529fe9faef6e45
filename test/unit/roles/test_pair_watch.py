"""What the histograms of a prefill and a decode instance are fed with."""

from __future__ import annotations

from link_pair import SCHEMA, card

from moonlang.base.clock import NS_PER_MS
from moonlang.core.pairing import Heard, Landed, Linked, Push, Refuse, Release, Span, Unreachable, Want
from moonlang.core.ticket import Completion, Outcome, Ticket
from moonlang.roles.pair_watch import PairWatch

P, D = card("p"), card("d")
WANT = Want(1, 5, b"key", 0, (3, 4, 5), 1000)


def sums(watch: PairWatch) -> dict[str, tuple[int, float]]:
    found = watch.report()["distributions"]
    return {name: (sum(one["counts"]), one["total"]) for name, one in found.items()}


def test_prefill() -> None:
    watch = PairWatch(P, prefills=True)
    watch.begun(1, 0)
    for _ in range(2):  # a Want that is repeated counts once
        watch.heard(Heard(D, WANT), 3 * NS_PER_MS)
    push = Push(room=1, peer=D, source=(1, 2), target=(3, 4), spans=(Span(0, 0, 500_000),), deadline_ns=0)
    watch.submitted(7, push, 10 * NS_PER_MS)
    watch.completed(7, Completion(Ticket(0, "x"), Outcome.OK, 2, 1_000_000), 12 * NS_PER_MS)
    watch.submitted(8, push, 10 * NS_PER_MS)
    watch.completed(8, Completion(Ticket(1, "x"), Outcome.FAILED), 12 * NS_PER_MS)
    for _ in range(2):
        watch.sent(Landed(1, 1, b"key", "digest", 5), 13 * NS_PER_MS)
    found = sums(watch)
    assert found["kv_transfer_latency_ms"] == (1, 2.0)
    assert found["kv_transfer_speed_gb_s"] == (1, 0.5)
    assert found["kv_transfer_total_mb"] == (1, 2.0)
    assert found["kv_transfer_bootstrap_ms"] == (1, 3.0)


def test_decode() -> None:
    watch = PairWatch(D, prefills=False)
    watch.begun(1, 0)
    watch.heard(Linked(1, P), 2 * NS_PER_MS)
    for at in (3, 203):
        watch.sent(WANT, at * NS_PER_MS)
    watch.sent(Release(1), 8 * NS_PER_MS)
    found = sums(watch)
    assert found["kv_transfer_bootstrap_ms"] == (1, 2.0)
    assert found["kv_transfer_alloc_ms"] == (1, 1.0)
    assert found["kv_transfer_latency_ms"] == (1, 5.0)
    assert found["kv_transfer_total_mb"] == (1, 3 * SCHEMA.page_bytes / 1e6)


def test_pairs_that_fail_count_as_such() -> None:
    watch = PairWatch(D, prefills=False)
    for room in range(3):
        watch.begun(room, 0)
    watch.heard(Unreachable(0, "nobody"), 1)
    watch.sent(Release(1, "error"), 1)
    watch.sent(Refuse(2, "error"), 1)
    assert watch.report()["bootstrap_failed"] == 1
    assert all(count == 0 for count, _ in sums(watch).values())
