"""Where the time of a request went, and where its prompt came from."""

from __future__ import annotations

from typing import Any

import pytest

from moonlang.base import clock
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import StreamHead, TextDelta
from moonlang.core.request import Handover
from moonlang.core.sampling import SamplingParams
from moonlang.entrypoints.receipt import Receipt

MS = clock.NS_PER_MS


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now_ns = 5_000 * MS

    def monotonic_ns(self) -> int:
        return self.now_ns


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(clock, "monotonic_ns", found.monotonic_ns)
    return found


def head(stream: bool = True, **more: Any) -> StreamHead:
    return StreamHead(prompt_tokens=100, cached_tokens=64, stream=stream, sampling=SamplingParams(), **more)


def answered(time: Clock, first: StreamHead) -> Receipt:
    """First token after 30 ms, the end after 80."""
    receipt = Receipt()
    time.now_ns += 30 * MS
    receipt.add(TextDelta(rid="r", text="a", tokens=(1,), head=first))
    time.now_ns += 50 * MS
    receipt.add(TextDelta(rid="r", text="b", tokens=(2, 3)))
    return receipt


def stages(receipt: Receipt) -> dict[str, float]:
    found = receipt.fields(16, receipt.elapsed_ns())["stages"]
    return {stage["name"]: round(1000 * stage["seconds"], 6) for stage in found}


def test_the_stages_of_a_server_alone_add_up(time: Clock) -> None:
    receipt = answered(time, head(queue_ns=10 * MS))
    assert stages(receipt) == {"queue": 10, "prefill": 20, "decode": 50}
    assert receipt.output_tokens == 3


def test_without_a_stream_prefill_and_decode_cannot_be_told_apart(time: Clock) -> None:
    assert stages(answered(time, head(stream=False, queue_ns=10 * MS))) == {"queue": 10, "compute": 70}


def test_the_stages_of_a_pair_add_up(time: Clock) -> None:
    move = Handover(pairing_ns=3 * MS, moving_ns=25 * MS, queue_ns=5 * MS, compute_ns=18 * MS, tokens=96)
    receipt = answered(time, head(queue_ns=28 * MS, handover=move))
    assert stages(receipt) == {"queue": 5, "prefill": 18, "transfer": 7, "decode": 50}
    assert receipt.fields(16, receipt.elapsed_ns())["prompt_tokens_by_source"]["received"] == 96


def test_a_peer_that_tells_tales_makes_no_negative_times(time: Clock) -> None:
    move = Handover(pairing_ns=0, moving_ns=0, queue_ns=-7, compute_ns=10**15, tokens=0)
    assert stages(answered(time, head(handover=move))) == {"queue": 0, "prefill": 30, "transfer": 0, "decode": 50}


def test_every_prompt_token_has_a_source(time: Clock) -> None:
    receipt = answered(time, head(host_tokens=16, storage_tokens=32))
    sources = receipt.fields(16, receipt.elapsed_ns())["prompt_tokens_by_source"]
    assert sources == {"device": 16, "host": 16, "storage": 32, "computed": 36, "received": 0}
    details = receipt.cached_details(ServerArgs(hicache_storage_backend="file"))
    assert details == {"device": 16, "host": 16, "storage": 32, "storage_backend": "file", "storage_miss": ""}


def test_before_anything_came(time: Clock) -> None:
    receipt = Receipt()
    time.now_ns += 4 * MS
    assert stages(receipt) == {"queue": 4}
    assert receipt.cached_details(ServerArgs()) == {"device": 0, "host": 0}
