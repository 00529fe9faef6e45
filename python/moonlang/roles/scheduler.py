"""The scheduler role: mailbox and executor on one side, the pure Scheduler on the other.

One step drains what has arrived, commits results, plans as far as the depth allows, and only then sends the tokens: the
executor works on the next plan while they are on their way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec

from moonlang.base import log
from moonlang.base.clock import NS_PER_S
from moonlang.base.errors import ConfigError, PeerError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.messages import Abort, Control, Generate, Message, Reply, StopHit, TokenBatch, TokenDelta
from moonlang.core.plan import StepPlan
from moonlang.core.ports import Endpoint, Executor
from moonlang.core.sampling import GrammarSpec
from moonlang.core.seat import Seat
from moonlang.core.ticket import Outcome, Ticket
from moonlang.mem_cache.tier_settings import TierConfig
from moonlang.model_executor.executor import ThreadExecutor
from moonlang.model_executor.runner import ModelRunner
from moonlang.roles import topology
from moonlang.roles.crew import Crew, placed
from moonlang.roles.experts import check_exchange
from moonlang.roles.grammars import grammar_engine
from moonlang.roles.members import Member
from moonlang.roles.pairing import Pairing, equip, pairing_config
from moonlang.roles.role import NEVER_NS
from moonlang.roles.step_log import StepLog
from moonlang.roles.surveys import Surveys
from moonlang.roles.tiers import TierChannels, tier_config
from moonlang.roles.tree_news import tree_news
from moonlang.scheduler.scheduler import Scheduler
from moonlang.scheduler.settings import PairingConfig, SchedulerConfig

_log = log.get(__name__)

_IDLE_CHECK_NS = NS_PER_S  # after so long without work the ledgers are checked once
_UNCUT = -1  # --chunked-prefill-size: prompts are never cut


@dataclass(frozen=True, slots=True)
class _Flush:
    """A flush_cache call that waits for the server to be idle."""

    control_id: int
    deadline_ns: int


class SchedulerRole:
    """Owns the model of one replica. See `roles.role.Role` for the contract."""

    def __init__(self, args: ServerArgs, model: ModelConfig, endpoint: Endpoint, seat: Seat | None = None) -> None:
        """seat: when several ranks compute the model, the one that plans."""
        self._grammars = grammar_engine(args, model)
        self._tickets: dict[Ticket, GrammarSpec] = {}
        if seat is None:
            check_exchange(args, model)
        self._leader = None if seat is None else (Member if seat.replicas > 1 else Crew)(args, model, seat)
        if self._leader is None:
            runner = ModelRunner(model, placed(args), self._grammars)
        else:
            runner = self._leader.runner(self._grammars)
        runner.warm_up()
        self._balanced = runner.balanced
        self._schema, self._pool_reason = runner.schema, runner.pool_reason
        self._kv_digest = runner.whole_schema.digest()
        outfit = equip(args, runner.regions) if args.disaggregation_mode != "null" else None
        pairing = pairing_config(args, outfit) if outfit is not None else None
        tiers = tier_config(args, runner.regions, runner.spare_bytes) if args.enable_hierarchical_cache else None
        self._scheduler = Scheduler(scheduler_config(args, model, runner, pairing, tiers))
        self._tiers: TierChannels | None = None
        if self._scheduler.tiers is not None:
            self._tiers = TierChannels(args, runner.regions, self._scheduler.tiers)
        self._pairing = Pairing(args, outfit, self._scheduler.peers) if outfit is not None else None
        self._news = tree_news(args, self._scheduler)
        depth = self._scheduler.config.depth
        self._executor: Executor = (
            ThreadExecutor(runner, depth) if self._leader is None else self._leader.executor(depth)
        )
        self._endpoint = endpoint
        self._steps = StepLog(args.decode_log_interval)
        self._flushes: list[_Flush] = []
        self._callers: dict[int, tuple[str, int]] = {}  # who waits for a reply, and under which number
        self._calls = 0
        self._detokenizers = topology.detokenizers(args)
        self._surveys = Surveys()
        self._hang_ns = int(args.watchdog_timeout * NS_PER_S) if args.watchdog_timeout > 0 else NEVER_NS
        self._in_flight = 0
        self._last_result_ns = 0
        self._check_ns = NEVER_NS
        pair_fds = self._pairing.wait_fds if self._pairing is not None else ()
        tier_fds = (self._tiers.fileno(),) if self._tiers is not None else ()
        self.wait_fds = (self._executor.fileno(), self._grammars.fileno(), *pair_fds, *tier_fds)
        self._announce(model)

    def ready_body(self) -> dict[str, Any]:
        """Sizes in tokens, and where the pool's size comes from."""
        config, stats = self._scheduler.config, self._scheduler.stats()
        longest = min(config.context_length, stats.max_total_tokens)
        return {
            "max_total_num_tokens": stats.max_total_tokens,
            "max_req_input_len": longest - 1,
            "context_length": config.context_length,
            "max_running_requests": config.max_running,
            "page_size": config.page_size,
            "kv_page_bytes": self._schema.page_bytes,
            "kv_pool_reason": self._pool_reason,
            "kv_digest": self._kv_digest,
            "kv_latent": self._schema.latent,
            "link": self._pairing.route if self._pairing is not None else None,
        }

    def step(self, now_ns: int) -> int:
        """Everything that can be done now; returns when to be called again although nothing happens."""
        deltas: list[TokenDelta] = []
        for envelope in self._endpoint.recv():
            deltas += self._handle(envelope.body, envelope.source, now_ns)
        deltas += self._compiled(now_ns)
        for result in self._executor.poll():
            self._in_flight -= 1
            self._last_result_ns = now_ns
            deltas += self._scheduler.commit(result, now_ns)
        if self._pairing is not None:
            deltas += self._pairing.take(self._executor.progress(), now_ns)
        if self._tiers is not None:
            self._tiers.take(now_ns)
        deltas += self._scheduler.expire(now_ns)
        if self._tiers is not None:
            self._tiers.carry_out(now_ns)  # a store that is left alone says so at once: nobody waits for it
            self._tiers.take(now_ns)
        self._submit(now_ns)
        if self._pairing is not None:
            self._pairing.carry_out(now_ns)
        if self._tiers is not None:
            self._tiers.carry_out(now_ns)
        if deltas:
            self._pass_on(deltas)
        for control_id, found in self._surveys.advance():
            self._reply(control_id, body=found)
        wake_ns = now_ns if self._surveys.busy else self._wake_ns(now_ns)
        if self._news is not None:
            self._news.tell()
        return wake_ns

    def close(self) -> None:
        self._executor.close()
        if self._leader is not None:
            self._leader.close()
        if self._pairing is not None:
            self._pairing.close()
        if self._tiers is not None:
            self._tiers.close()
        if self._news is not None:
            self._news.close()
        self._grammars.close()

    # ---- inside

    def _pass_on(self, deltas: list[TokenDelta]) -> None:
        """All tokens of the step, in one message for each detokenizer: a request always goes to the same one."""
        names = self._detokenizers
        if len(names) == 1:
            self._endpoint.send(names[0], TokenBatch(tuple(deltas)))
            return
        shares: list[list[TokenDelta]] = [[] for _ in names]
        for delta in deltas:
            shares[crc32(delta.rid.encode()) % len(names)].append(delta)
        for name, share in zip(names, shares, strict=True):
            if share:
                self._endpoint.send(name, TokenBatch(tuple(share)))

    def _announce(self, model: ModelConfig) -> None:
        config, stats, schema = self._scheduler.config, self._scheduler.stats(), self._schema
        part_gb = schema.token_bytes * stats.max_total_tokens / schema.halves / 1e9
        sizes = ", ".join(f"{part} size: {part_gb:.2f} GB" for part in (("KV",) if schema.latent else ("K", "V")))
        _log.info(
            "KV Cache is allocated. dtype: torch.%s, #tokens: %d, %s", schema.dtype, stats.max_total_tokens, sizes
        )
        _log.info(
            "max_total_num_tokens=%d, chunked_prefill_size=%s, max_prefill_tokens=%d, max_running_requests=%d, "
            "context_len=%d",
            stats.max_total_tokens,
            config.chunk_tokens if config.chunk_tokens is not None else _UNCUT,
            config.max_prefill_tokens,
            config.max_running,
            model.context_length,
        )

    def _handle(self, body: Message, source: str, now_ns: int) -> list[TokenDelta]:
        match body:
            case Generate():
                if self._pairing is not None:
                    self._pairing.begin(body, now_ns)
                deltas = self._scheduler.add(body, now_ns)
                for spec in self._scheduler.grammars_wanted():
                    self._tickets[self._grammars.submit(spec)] = spec
                return deltas
            case Abort():
                return self._scheduler.abort(body.rid, exact=body.exact, every=body.abort_all, message=body.message)
            case StopHit():
                self._scheduler.stop(body.rid)
            case Control():
                self._calls += 1
                self._callers[self._calls] = source, body.id
                self._control(msgspec.structs.replace(body, id=self._calls), now_ns)
            case _:
                raise PeerError(f"The scheduler got a {type(body).__name__}, which is not for it.")
        return []

    def _control(self, call: Control, now_ns: int) -> None:
        match call.verb:
            case "ping":
                self._reply(call.id)
            case "flush_cache":
                wait_ns = int(float(call.args.get("timeout_s") or 0) * NS_PER_S)
                self._flushes.append(_Flush(call.id, now_ns + wait_ns))
            case "attach_store" | "detach_store" | "clear_store" | "store":
                self._store(call, now_ns)
            case "tree":
                if not self._surveys.begin(call.id, self._scheduler.cache, int(call.args["nodes"])):
                    self._reply(call.id, ok=False, message="Too many surveys of the tree are under way.")
            case "loads" | "state":
                self._reply(call.id, body=self._load(now_ns))

    def _store(self, call: Control, now_ns: int) -> None:
        """What concerns the store below the host tier."""

        def told(done: bool, error: str) -> None:
            self._reply(call.id, ok=done, message=error)

        tiers, args = self._tiers, call.args
        if tiers is None:
            hint = "This server has no hierarchical cache: start it with --enable-hierarchical-cache."
            self._reply(call.id, ok=call.verb == "store", message=hint)
            return
        try:
            if call.verb == "attach_store":
                tiers.attach(str(args["backend"]), dict(args["extra"]), told, now_ns)
            elif call.verb == "detach_store":
                tiers.detach(told, now_ns)
            elif call.verb == "clear_store":
                tiers.clear(told)
            else:
                self._reply(call.id, body={"backend": tiers.backend})
        except ConfigError as error:
            told(False, str(error))

    def _reply(
        self, control_id: int, *, ok: bool = True, message: str = "", body: dict[str, Any] | None = None
    ) -> None:
        caller, number = self._callers.pop(control_id)
        self._endpoint.send(caller, Reply(number, ok, message, body or {}))

    def _load(self, now_ns: int) -> dict[str, Any]:
        stats = self._scheduler.stats()
        derived = {
            "token_usage": stats.token_usage,
            "cache_hit_rate": stats.cache_hit_rate,
            "gen_throughput": self._steps.throughput(now_ns),
        }
        load: dict[str, Any] = msgspec.to_builtins(stats) | derived
        if self._pairing is not None:
            load["pairs"] |= self._pairing.report()
            load["pairs"]["transfer_failed"] = stats.pairs.total_failed - load["pairs"]["bootstrap_failed"]
        if self._tiers is not None:
            load["store"] = self._tiers.report()
        if self._balanced is not None:
            load["experts"] = self._balanced.report()
        return load

    def _compiled(self, now_ns: int) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        if self._tickets:
            for done in self._grammars.poll():
                spec = self._tickets.pop(done.ticket)
                error = "" if done.outcome is Outcome.OK else done.error or "The grammar could not be compiled."
                deltas += self._scheduler.grammar_ready(spec, error, now_ns)
        return deltas

    def _submit(self, now_ns: int) -> None:
        while (plan := self._scheduler.plan(now_ns)) is not None:
            if not self._in_flight:
                self._last_result_ns = now_ns
            self._in_flight += 1
            self._executor.submit(plan)
            self._record(plan, now_ns)
        if self._in_flight and now_ns - self._last_result_ns > self._hang_ns:
            seconds = (now_ns - self._last_result_ns) // NS_PER_S
            raise PeerError(f"The model has not finished a step for {seconds} s.", hint="See --watchdog-timeout.")

    def _record(self, plan: StepPlan, now_ns: int) -> None:
        self._check_ns = now_ns + _IDLE_CHECK_NS
        report = self._scheduler.report
        if report.new_tokens:
            self._steps.prefill(report, self._scheduler.stats(), now_ns)
        if report.decode_rows and self._steps.decode(report.decode_rows, now_ns):
            self._steps.decode_line(self._scheduler.stats(), now_ns)

    def _wake_ns(self, now_ns: int) -> int:
        """The nearest of: a deadline, a flush that gives up, the check after work, a look at a plan that takes long."""
        if self._flushes:
            self._flush(now_ns)
        if now_ns >= self._check_ns and self._scheduler.idle:
            self._scheduler.check()
            self._check_ns = NEVER_NS
        wakes = [self._check_ns if self._scheduler.idle else NEVER_NS]
        wakes += [flush.deadline_ns for flush in self._flushes]
        if self._tiers is not None:
            wakes.append(self._tiers.wake_ns(now_ns))
        if self._in_flight and self._hang_ns != NEVER_NS:
            wakes.append(self._last_result_ns + self._hang_ns + 1)
        deadline_ns = self._scheduler.next_wake_ns()
        if deadline_ns is not None:
            wakes.append(deadline_ns)
        return min(wakes)

    def _flush(self, now_ns: int) -> None:
        done = self._scheduler.flush_cache()
        keep: list[_Flush] = []
        for flush in self._flushes:
            if done:
                self._reply(flush.control_id, message="Cache flushed.")
            elif now_ns >= flush.deadline_ns:
                self._reply(flush.control_id, ok=False, message="The cache is in use: requests are running or waiting.")
            else:
                keep.append(flush)
        self._flushes = keep


def scheduler_config(
    args: ServerArgs,
    model: ModelConfig,
    runner: ModelRunner,
    pairing: PairingConfig | None = None,
    tiers: TierConfig | None = None,
) -> SchedulerConfig:
    """The scheduler's bounds from resolved arguments and the pool that fitted."""
    chunk = args.chunked_prefill_size
    lanes = args.pp_size + args.pp_async_batch_depth if args.pp_size > 1 else 1
    return SchedulerConfig(
        num_pages=runner.num_pages,
        page_size=runner.schema.page_size,
        context_length=model.context_length,
        max_running=runner.max_slots,
        max_queued=args.max_queued_requests,
        chunk_tokens=None if chunk is None or chunk == _UNCUT else chunk,
        max_prefill_tokens=args.max_prefill_tokens,
        prefill_max_requests=args.prefill_max_requests,
        policy=args.schedule_policy,
        eviction=args.radix_eviction_policy,
        radix=not args.disable_radix_cache,
        depth=lanes if lanes > 1 else 1 if args.disable_overlap_schedule else 2,
        lanes=lanes,
        lane_rows=args.pp_max_micro_batch_size if lanes > 1 else None,
        eos_token_ids=model.eos_token_ids,
        conservativeness=args.schedule_conservativeness,
        priority=args.enable_priority_scheduling or args.schedule_policy == "priority",
        priority_low_first=args.schedule_low_priority_values_first,
        preempt=not args.disable_priority_preemption,
        preempt_gap=args.priority_scheduling_preemption_threshold,
        seed=args.random_seed or 0,
        reserved_tokens=args.num_reserved_decode_tokens if args.disaggregation_mode == "decode" else 0,
        pairing=pairing,
        tiers=tiers,
    )
