"""From a call to an answer: choosing workers, and trying again elsewhere."""

from __future__ import annotations

import asyncio
import random

from moonlang.base import clock, log
from moonlang.base.errors import PeerError
from moonlang.router import policy, prefix_index
from moonlang.router.args import RouterArgs
from moonlang.router.attempt import Answer, Attempts, Call
from moonlang.router.errors import NoWorkerError
from moonlang.router.metrics import RouterMetrics
from moonlang.router.policy import CacheAware, Policy
from moonlang.router.workers import Kind, Worker, WorkerSet

_log = log.get(__name__)

PASSING = frozenset({408, 429, 500, 502, 503, 504})  # another worker may do better


class Dispatcher:
    """Has calls answered by the workers of a set, by the policies and limits of `args`."""

    def __init__(self, workers: WorkerSet, attempts: Attempts, args: RouterArgs, metrics: RouterMetrics) -> None:
        self._workers = workers
        self._attempts = attempts
        self._args = args
        self._metrics = metrics
        self._random = random.Random()
        limits = CacheAware(
            threshold=args.cache_threshold, abs_load=args.balance_abs_threshold, rel_load=args.balance_rel_threshold
        )
        self.policies: dict[Kind, str] = {
            "regular": args.policy,
            "prefill": args.prefill_policy or args.policy,
            "decode": args.decode_policy or "power_of_two",
        }
        self._choose: dict[Kind, Policy] = {
            kind: policy.find(name, self._random, limits) for kind, name in self.policies.items()
        }

    async def answer(self, call: Call) -> Answer:
        """The first answer that is worth passing on, or the last one that is there.

        NoWorkerError when there is nobody to ask; PeerError when the last attempt was broken off.
        """
        retries = 0 if self._args.disable_retries else self._args.retry_max_retries
        tried: dict[str, None] = {}
        for attempt in range(retries):
            try:
                answer = await self._attempt(call, tried)
                if answer.status not in PASSING:
                    return answer
                answer.close()
                why = f"status {answer.status}"
            except NoWorkerError:
                if not attempt:
                    raise
                why = "no worker"
            except PeerError as error:
                why = str(error)
            self._metrics.retried(call.route)
            _log.info("%s is tried again: %s", call.route, why)
            await asyncio.sleep(self._backoff_s(attempt))
        return await self._attempt(call, tried)

    async def _attempt(self, call: Call, tried: dict[str, None]) -> Answer:
        now_ns = clock.monotonic_ns()
        if call.generates:
            lacking = self._workers.lacking(now_ns)
            if lacking:
                raise NoWorkerError(lacking)
            workers = [self._chosen(kind, call.body.prompt, tried, now_ns) for kind in self._workers.kinds]
        else:
            up: list[Kind] = [kind for kind in self._workers.kinds if self._workers.usable(kind, now_ns)]
            if not up:
                raise NoWorkerError("No worker is up.")
            workers = [self._chosen(up[0], b"", tried, now_ns)]
        tried.update((worker.id, None) for worker in workers)
        if len(workers) == 1:
            return await self._attempts.single(call, workers[0])
        return await self._attempts.pair(call, *workers)

    def _chosen(self, kind: Kind, prompt: bytes, tried: dict[str, None], now_ns: int) -> Worker:
        """A usable worker; one that has been tried only when there are no others."""
        usable = self._workers.usable(kind, now_ns)
        fresh = [worker for worker in usable if worker.id not in tried] or usable
        path = prefix_index.path(prompt) if self.policies[kind] == "cache_aware" else ()
        worker = self._choose[kind](fresh, path)
        worker.selected_total += 1
        return worker

    def _backoff_s(self, attempt: int) -> float:
        """How long to wait before the attempt that follows this one."""
        args = self._args
        wait_ms = min(args.retry_initial_backoff_ms * args.retry_backoff_multiplier**attempt, args.retry_max_backoff_ms)
        return wait_ms / 1000 * (1 + args.retry_jitter_factor * self._random.uniform(-1, 1))
