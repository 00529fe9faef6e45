"""Which replica gets a request."""

from __future__ import annotations

from collections import Counter

import pytest

from moonlang.base.errors import RequestError
from moonlang.core.messages import Generate
from moonlang.core.pairing import PeerSpec
from moonlang.core.sampling import SamplingParams
from moonlang.entrypoints.dispatch import Dispatch


def ask(tokens: int = 1, *, rank: int | None = None, room: int | None = None) -> Generate:
    peer = None if room is None else PeerSpec("host", 1, room)
    return Generate("r", [0] * tokens, SamplingParams(), peer=peer, dp_rank=rank)


def send(dispatch: Dispatch, message: Generate) -> int:
    replica = dispatch.choose(message)
    dispatch.began(replica, len(message.input_ids))
    return replica


def test_replicas_take_turns() -> None:
    dispatch = Dispatch("round_robin", 3)
    assert [send(dispatch, ask()) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_request_that_names_a_replica_gets_it_and_takes_nobodys_turn() -> None:
    dispatch = Dispatch("round_robin", 3)
    assert [send(dispatch, ask(rank=rank)) for rank in (None, 2, 2, None)] == [0, 2, 2, 1]


@pytest.mark.parametrize("rank", [-1, 2])
@pytest.mark.parametrize("method", ["round_robin", "total_tokens"])
def test_a_replica_that_does_not_exist_is_refused(method: str, rank: int) -> None:
    with pytest.raises(RequestError, match=rf"routed_dp_rank must be in \[0, 1\], got {rank}"):
        Dispatch(method, 2).choose(ask(rank=rank))


def test_rooms_decide() -> None:
    dispatch = Dispatch("follow_bootstrap_room", 3)
    assert [send(dispatch, ask(room=room)) for room in (0, 7, 2**63 - 1)] == [0, 1, (2**63 - 1) % 3]
    assert Counter(send(dispatch, ask()) for _ in range(6)) == {0: 2, 1: 2, 2: 2}  # those without one take turns


def test_the_one_with_the_fewest_requests_gets_the_next() -> None:
    dispatch = Dispatch("total_requests", 2)
    assert Counter(send(dispatch, ask()) for _ in range(10)) == {0: 5, 1: 5}
    for _ in range(3):
        dispatch.ended(1, 1)
    assert [send(dispatch, ask(1000)) for _ in range(3)] == [1, 1, 1]


def test_the_one_with_the_fewest_tokens_gets_the_next() -> None:
    dispatch = Dispatch("total_tokens", 2)
    first = send(dispatch, ask(100))
    assert [send(dispatch, ask(30)) for _ in range(3)] == [1 - first] * 3
    dispatch.grew(1 - first, 20)
    assert send(dispatch, ask(5)) == first
    dispatch.ended(1 - first, 50)
    assert send(dispatch, ask(5)) == 1 - first
    assert [(share.requests, share.tokens) for share in dispatch.shares] == [(2, 105), (3, 65)]


def test_one_replica_serves_all() -> None:
    dispatch = Dispatch("total_tokens", 1)
    assert [send(dispatch, ask(rank=rank)) for rank in (None, 0, None)] == [0, 0, 0]


@pytest.mark.parametrize("method", ["round_robin", "total_requests", "total_tokens", "follow_bootstrap_room"])
def test_a_lost_replica_gets_nothing(method: str) -> None:
    dispatch = Dispatch(method, 3)
    for _ in range(3):
        send(dispatch, ask())
    dispatch.lose(1)
    assert Counter(send(dispatch, ask()) for _ in range(6)) == {0: 3, 2: 3}
    assert [(share.requests, share.tokens) for share in dispatch.shares] == [(4, 4), (0, 0), (4, 4)]
    with pytest.raises(RequestError, match="Replica 1 is lost") as caught:
        dispatch.choose(ask(rank=1))
    assert caught.value.status == 503
    dispatch.lose(0)
    assert {send(dispatch, ask()) for _ in range(3)} == {2}
