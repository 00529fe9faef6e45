"""The engine's asyncio client: delivery, hang-ups, rids, management calls, a dying engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from fake_engine import CharTokenizer, FakeEngine, model_config

from moonlang.base.errors import RequestError
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control, Generate, Message, Reply, TextBatch, TextDelta
from moonlang.core.request import Finish
from moonlang.core.sampling import SamplingParams
from moonlang.entrypoints.client import EngineClient
from moonlang.entrypoints.stream import merge
from moonlang.messaging.inproc import Hub, InprocEndpoint


def run(case: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(case, 20))


def ask(rid: str, text: str = "abc", *, key: str = "", limit: int | None = None) -> Generate:
    return Generate(
        rid=rid,
        input_ids=[ord(c) for c in text],
        sampling=SamplingParams(max_new_tokens=limit),
        stream=True,
        extra_key=key,
    )


def with_client(case: Any, **model: Any) -> None:
    async def main() -> None:
        with FakeEngine() as engine:
            client = engine.client(**model)
            client.start(asyncio.get_running_loop())
            try:
                await case(engine, client)
            finally:
                client.close()

    run(main())


def test_deltas_of_one_request_arrive_in_order_and_once() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        found = [delta async for delta in client.stream(ask("a", "hello"))]
        whole = merge(found)
        assert whole.text == "olleh"
        assert whole.head is not None
        assert whole.head.prompt_tokens == 5
        assert whole.finish is not None
        assert client.live_count == 0

    with_client(case)


def test_one_stream_carries_all_sequences_of_a_call() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        texts = ["", "", ""]
        with client.open([ask("x", "ab"), ask("y", "cdef"), ask("z", "g")]) as stream:
            while not stream.finished:
                for index, delta in await stream.next():
                    texts[index] += delta.text
        assert texts == ["ba", "fedc", "g"]

    with_client(case)


def test_many_streams_at_once() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        async def one(number: int) -> None:
            text = f"prompt {number}"
            assert merge([d async for d in client.stream(ask(str(number), text))]).text == text[::-1]

        await asyncio.gather(*(one(number) for number in range(100)))
        assert client.live_count == 0

    with_client(case)


def test_closing_early_aborts_exactly_that_request() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        with client.open([ask("a", key="hold")]) as first, client.open([ask("ab", key="hold")]) as neighbour:
            await first.next()
            await neighbour.next()
            first.close()
            assert client.live_count == 2  # "a" stays taken until the engine has let go
            aborts = await asyncio.to_thread(engine.wait_for, Abort)
            assert [(abort.rid, abort.exact) for abort in aborts] == [("a", True)]
            while client.live_count == 2:
                await asyncio.sleep(0)
            assert not neighbour.finished

    with_client(case)


def test_cancelling_the_consumer_aborts() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        async def consume() -> None:
            with client.open([ask("a", key="hold")]) as stream:
                while True:
                    await stream.next()

        task = asyncio.ensure_future(consume())
        await asyncio.to_thread(engine.wait_for, Generate)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(engine.wait_for, Abort)

    with_client(case)


def test_a_prefix_abort_ends_the_streams_with_an_abort_finish() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        with client.open([ask("job_1", key="hold"), ask("job_2", key="hold"), ask("other")]) as stream:
            client.abort("job_")
            kinds: dict[int, str] = {}
            while not stream.finished:
                for index, delta in await stream.next():
                    if delta.finish is not None:
                        kinds[index] = delta.finish.kind
        assert kinds == {0: "abort", 1: "abort", 2: "stop"}

    with_client(case)


def test_a_live_rid_is_refused() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        with client.open([ask("a", key="hold")]):
            with pytest.raises(RequestError, match="'a' is already in use") as caught:
                client.open([ask("a")])
            assert caught.value.status == 400
        with pytest.raises(RequestError, match="'a' is being aborted") as caught:  # the scheduler has not let go of it
            client.open([ask("a")])
        assert caught.value.status == 503
        with pytest.raises(RequestError, match="must differ"):
            client.open([ask("b"), ask("b")])

    with_client(case)


def test_a_slow_consumer_gets_everything_at_once() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        with client.open([ask("a", "hello")]) as stream:
            while client.live_count:
                await asyncio.sleep(0)
            items = await stream.next()
            assert stream.finished
            assert merge([delta for _, delta in items]).text == "olleh"

    with_client(case)


def test_management_calls_are_answered_each_with_its_own_reply() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        loads, flush = await asyncio.gather(client.control("loads"), client.control("flush_cache"))
        assert loads.body["num_running"] == 2
        assert flush.ok
        assert flush.body == {}

    with_client(case)


def test_a_management_call_has_a_deadline() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        engine.silent = True
        with pytest.raises(RequestError, match="did not answer") as caught:
            await client.control("loads", timeout_s=0.01)
        assert caught.value.status == 504

    with_client(case)


def test_when_the_engine_dies_everything_ends_with_503() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        engine.silent = True
        call = asyncio.ensure_future(client.control("loads"))
        with client.open([ask("a", key="hold")]) as stream:
            await asyncio.sleep(0)
            client.fail("The scheduler was killed by SIGKILL.")
            client.fail("A second reason.")
            ((_, delta),) = await stream.next()
            assert stream.finished
        assert delta.finish is not None
        assert (delta.finish.status, delta.finish.message) == (503, "The scheduler was killed by SIGKILL.")
        with pytest.raises(RequestError, match="SIGKILL"):
            await call
        with pytest.raises(RequestError, match="SIGKILL") as caught:
            client.open([ask("b")])
        assert caught.value.status == 503

    with_client(case)


def test_long_texts_are_tokenised_off_the_loop_and_hopeless_ones_not_at_all() -> None:
    async def case(engine: FakeEngine, client: EngineClient) -> None:
        assert await client.encode("ab") == [97, 98]
        assert len(await client.encode("x" * 10_000)) == 10_000
        with pytest.raises(RequestError, match="is longer than the model's context length"):
            await client.encode("x" * 1_000_000)

    with_client(case, context_length=20_000)


def test_merge_keeps_what_each_delta_says() -> None:
    parts = [TextDelta(rid="a", text="x", tokens=(1,)), TextDelta(rid="a", text="", tokens=(2, 3), retractions=1)]
    assert merge(parts) == TextDelta(rid="a", text="x", tokens=(1, 2, 3), retractions=1)


class Two:
    """Two replicas that say what the test has them say."""

    def __init__(self) -> None:
        self.hub = Hub(("api", "scheduler", "scheduler-1"))
        self.ends = [InprocEndpoint(name, self.hub) for name in ("scheduler", "scheduler-1")]
        args = ServerArgs(dp_size=2, elastic_ep_backend="mooncake")
        self.client = EngineClient(InprocEndpoint("api", self.hub), CharTokenizer(), model_config(), args, {})
        self.client.start(asyncio.get_running_loop())

    def heard(self, replica: int) -> list[Message]:
        return [envelope.body for envelope in self.ends[replica].recv()]

    def say(self, replica: int, rid: str, text: str, finish: Finish | None = None) -> None:
        delta = TextDelta(rid=rid, text=text, tokens=tuple(map(ord, text)), finish=finish)
        self.ends[replica].send("api", TextBatch((delta,)))


def with_two(case: Any) -> None:
    async def main() -> None:
        two = Two()
        try:
            await case(two, two.client)
        finally:
            two.client.close()
            two.hub.close()

    run(main())


def test_requests_of_a_lost_replica_go_on_elsewhere() -> None:
    async def case(two: Two, client: EngineClient) -> None:
        with client.open([ask("a", "xy"), ask("b")]) as stream:
            assert [message.rid for message in two.heard(1) if isinstance(message, Generate)] == ["b"]
            two.say(0, "a", "hel")
            await stream.next()
            client.lose("scheduler")
            (again,) = two.heard(1)
            assert isinstance(again, Generate)
            assert (again.rid, again.dp_rank, again.again, again.said) == ("a", 1, 1, tuple(map(ord, "hel")))
            assert again.input_ids == [ord("x"), ord("y")]
            two.say(1, "a", "lo", Finish(kind="stop"))
            two.say(1, "b", "b", Finish(kind="stop"))
            while not stream.finished:
                await stream.next()
            # It may have ended before it was sent again: then somebody still works for it.
            assert [message.rid for message in two.heard(1) if isinstance(message, Abort)] == ["a"]
            assert client.live_count == 0

    with_two(case)


def test_a_request_that_nobody_waits_for_ends_with_its_replica() -> None:
    async def case(two: Two, client: EngineClient) -> None:
        client.open([ask("a")]).close()
        assert client.live_count == 1
        client.lose("scheduler")
        assert client.live_count == 0
        assert two.heard(1) == []
        client.open([ask("a")]).close()  # the id is free again
        assert [type(message) for message in two.heard(1)] == [Generate, Abort]

    with_two(case)


def test_when_a_replica_is_lost_its_calls_do_not_wait() -> None:
    async def case(two: Two, client: EngineClient) -> None:
        calls = asyncio.ensure_future(client.controls("loads"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        (call,) = two.heard(0)
        assert isinstance(call, Control)
        client.lose("scheduler-1")
        two.ends[0].send("api", Reply(call.id, True))
        assert list(await calls) == [0]
        assert client.living == (0,)

    with_two(case)
