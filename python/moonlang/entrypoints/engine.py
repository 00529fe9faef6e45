"""`moonlang.Engine`: the server without HTTP, in the user's own process, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar

from moonlang.base import log
from moonlang.base.errors import ConfigError, RequestError
from moonlang.config.prepare import Prepared, prepare
from moonlang.config.server_args import ServerArgs
from moonlang.entrypoints import describe, generation
from moonlang.entrypoints.bootstrap import open_bootstrap
from moonlang.entrypoints.client import EngineClient
from moonlang.roles import exits, topology
from moonlang.roles.supervisor import Cluster
from moonlang.text.tokenizer import Tokenizer, load_tokenizer

Result = TypeVar("Result")
Answer = dict[str, Any]

_LAST_WORDS_S = 1.0  # for calls that still wait at the shutdown to hear of it


class Engine:
    """Generate text without a server. Keyword arguments are those of the server's flags; `log_level` is "error" here.

    Calls may come from any thread, and the async ones from any event loop: the engine has a loop of its own. Wrong
    arguments are a ConfigError, refused requests a RequestError. Use it as a context manager or call `shutdown`; at the
    end of the program, or when nobody holds the engine any more, it shuts down by itself.
    """

    def __init__(self, *, server_args: ServerArgs | None = None, **kwargs: Any) -> None:
        if server_args is not None and kwargs:
            raise ConfigError("Engine takes server_args or single arguments, not both.")
        args = server_args or ServerArgs.create(**{"log_level": "error", **kwargs})
        if args.tokenizer_worker_num > 1:
            raise ConfigError(
                "Engine answers no HTTP requests: tokenizer_worker_num has no meaning.", hint="Leave it out."
            )
        log.configure("engine", args.log_level)
        self._running = _Running(prepare(args))
        self.server_args = self._running.client.args
        self._finalizer = weakref.finalize(self, self._running.close)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None with skip_tokenizer_init."""
        return self._running.client.tokenizer

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | Iterator[Answer]:
        """What POST /generate answers: a dict for one prompt, a list for several; an iterator of them with `stream`.

        fields: further ones of /generate, such as return_logprob, logprob_start_len, top_logprobs_num, rid.
        """
        body = _body(prompt, sampling_params, input_ids, fields)
        if stream:
            return self._iterate(body)
        return self._running.run(generation.generate(self._running.client, body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:
        """The same for the caller's event loop; awaited, it is the answer, or with `stream` an async iterator."""
        body = _body(prompt, sampling_params, input_ids, fields)
        if stream:
            return self._iterate_async(body)
        return await self._running.arun(generation.generate(self._running.client, body))

    def flush_cache(self, timeout_s: float = 0) -> bool:
        """Forget all cached prefixes. False when requests still run after `timeout_s`."""
        call = self._running.client.control("flush_cache", {"timeout_s": timeout_s}, timeout_s=timeout_s + 10)
        return self._running.run(call).ok

    def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        """End the requests whose id begins with `rid`, or all of them; they answer with an abort as finish reason."""
        if not rid and not abort_all:
            raise RequestError("Either rid or abort_all must be given.")
        self._running.call(self._running.client.abort, rid, abort_all)

    def get_server_info(self) -> Answer:
        """What GET /server_info answers."""
        return self._running.run(describe.server_info(self._running.client))

    def get_model_info(self) -> Answer:
        """What GET /model_info answers."""
        return describe.model_info(self._running.client)

    def get_all_child_pids(self) -> list[int]:
        """Process ids of the roles."""
        return [role["pid"] for role in self._running.client.ready.values()]

    def shutdown(self) -> None:
        """Stop everything. May be called twice; calls that are waiting end with a RequestError."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _iterate(self, body: dict[str, Any]) -> Iterator[Answer]:
        running = self._running
        pieces = generation.generate_stream(running.client, body)
        try:
            while (piece := running.run(_next(pieces))) is not None:
                yield piece
        finally:
            running.abandon(pieces)

    async def _iterate_async(self, body: dict[str, Any]) -> AsyncIterator[Answer]:
        running = self._running
        pieces = generation.generate_stream(running.client, body)
        try:
            while (piece := await running.arun(_next(pieces))) is not None:
                yield piece
        finally:
            running.abandon(pieces)


class _Running:
    """What an engine consists of while it runs: the roles, the client, and an event loop on a thread of its own.

    Apart from Engine, so that the thread does not keep an engine alive that nobody holds any more.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._bootstrap = open_bootstrap(prepared.args)
        try:
            self._cluster = Cluster(prepared.args, prepared.model)
            self.client = _client(prepared, self._cluster)
            if self._bootstrap is not None:
                schedulers = topology.schedulers(prepared.args)
                self._bootstrap.announce(*(self.client.ready[name]["link"] for name in schedulers))
        except BaseException:
            if self._bootstrap is not None:
                self._bootstrap.close()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="moonlang-engine", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()  # nothing is submitted behind the winding up
        self._closing = False
        self.call(self.client.start, self._loop)
        self._cluster.on_death(self._role_died)
        self._cluster.on_loss(self._role_lost)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, awaited on the engine's loop; abandoned there when the caller is interrupted."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def arun(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The same for another event loop."""
        return await asyncio.wrap_future(self._submit(work))

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call `function` on the loop's thread and wait for it."""

        async def work() -> None:
            function(*args)

        self.run(work())

    def abandon(self, pieces: AsyncGenerator[Answer]) -> None:
        """Close a stream that is not read any further: its requests are aborted."""
        with contextlib.suppress(RequestError):  # nothing is left to abort
            self._submit(_close(pieces))

    def close(self) -> None:
        """Fail what still waits, stop the loop, stop the roles. Called once."""
        with self._lock:
            self._closing = True
            wind_up = asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop)
        wind_up.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._bootstrap is not None:
            self._bootstrap.close()
        self._cluster.close()

    async def _wind_up(self) -> None:
        self.client.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        if waiting:
            await asyncio.wait(waiting, timeout=_LAST_WORDS_S)
        await self._loop.shutdown_asyncgens()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        with self._lock:
            if not self._closing:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RequestError("The engine has been shut down.", status=503)

    def _role_lost(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            self._loop.call_soon_threadsafe(self.client.lose, name)

    def _role_died(self, name: str, status: int, lines: tuple[str, ...]) -> None:
        text = "\n".join((f"The {name} {exits.describe(status)}.", *lines))
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            self._loop.call_soon_threadsafe(self.client.fail, text)


def _client(prepared: Prepared, cluster: Cluster) -> EngineClient:
    """The client of a cluster that is starting: the tokenizer is loaded meanwhile."""
    args, model = prepared.args, prepared.model
    try:
        tokenizer = None
        if not args.skip_tokenizer_init:
            tokenizer = load_tokenizer(args.tokenizer_path or model.path, args.trust_remote_code, args.tokenizer_mode)
        cluster.wait_ready()
    except BaseException:  # also Ctrl-C: nothing may be left running
        cluster.close()
        raise
    return EngineClient(cluster.endpoint, tokenizer, model, args, cluster.ready)


async def _next(pieces: AsyncGenerator[Answer]) -> Answer | None:
    return await anext(pieces, None)


async def _close(pieces: AsyncGenerator[Answer]) -> None:
    await pieces.aclose()


def _body(prompt: Any, sampling_params: Any, input_ids: Any, fields: dict[str, Any]) -> dict[str, Any]:
    body = {"text": prompt, "input_ids": input_ids, "sampling_params": sampling_params, **fields}
    return {name: value for name, value in body.items() if value is not None}
