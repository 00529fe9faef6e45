"""ModelRunner: loads a model, sizes its KV pool and executes plans over both."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from moonlang.base import log
from moonlang.base.errors import BugError
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.kv import KvSchema
from moonlang.core.plan import Row, SlotStart, StepPlan, StepResult
from moonlang.core.ports import GrammarEngine
from moonlang.core.sampling import SamplingParams
from moonlang.distributed.group import Group
from moonlang.distributed.pipe import Pipe
from moonlang.model_executor import networks, sizing
from moonlang.model_executor.allocator import keep_freed_memory
from moonlang.model_executor.layout import Batch
from moonlang.model_executor.plan_runner import Hidden, Ints, PlanRunner, StepTimes
from moonlang.model_executor.pool_sharing import private_pool, shared_pool
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.slots import SlotTable
from moonlang.model_loader import fingerprint
from moonlang.models import registry as models
from moonlang.moe.eplb import Balancer, Balancing, ExpertLayer, Totals
from moonlang.moe.exchange.port import ExpertExchange
from moonlang.moe.placement import Placement

_log = log.get(__name__)

_DEFAULT_SLOTS = 256


class _Released:
    """A network without weights."""

    def forward(self, batch: Batch, kept: Ints, progress: Progress | None) -> Hidden | None:
        raise BugError("A rank computes that has no weights.")


class ModelRunner:
    """One model on one device, or one shard of it.

    schema: layout of a page; whole_schema: of the pages of all ranks put together; num_pages: size of the pool,
    `pool_reason` says why; max_slots: rows a plan may name; regions: the pools of all ranks as other engines see them
    (in rank 0; elsewhere its own); spare_bytes: memory that was free and that neither weights nor pool take;
    computed_by: which kernels compute the model; balanced: what has come of balancing its experts, None: nobody does.
    """

    def __init__(
        self,
        config: ModelConfig,
        args: ServerArgs,
        grammars: GrammarEngine | None = None,
        group: Group | None = None,
        exchange: ExpertExchange | None = None,
        pipe: Pipe | None = None,
        expert_group: Group | None = None,
    ) -> None:
        """group: those who hold the other shards; each makes its own ModelRunner at the same time. exchange: what
        carries tokens to the experts that those hold; None: all ranks have all tokens. pipe: of a stage of a pipeline.
        expert_group: ranks that share experts, though not all of them share the rest: they run plans of their own, in
        the same rounds (`rounds`)."""
        self.config = config
        self.device = torch.device(args.device or "cpu")
        self.max_slots = args.max_running_requests or _DEFAULT_SLOTS
        self.vocab_size = config.vocab_size
        keep_freed_memory()
        free = sizing.free_bytes(self.device)
        if self.device.type == "cpu":
            free //= args.dp_size * config.stage.size  # they share the memory of the machine
        spec = models.spec_for(config, args.model_impl)
        loaded = networks.load(config, spec, args, self.device, group, exchange, expert_group)
        self.expert_layers = loaded.expert_layers
        self._packed = loaded.packed
        sharers = (expert_group or group) if exchange is not None else None
        self.balancer = _balancer(args, self.expert_layers, sharers)
        self.balanced = self.balancer and self.balancer.totals
        weights = fingerprint(config, args.load_format)
        self.schema: KvSchema = spec.kv_schema(config, args.page_size or 1, weights, args.kv_cache_dtype)
        self.whole_schema = msgspec.structs.replace(
            self.schema, num_kv_heads=config.num_kv_heads, num_layers=config.num_layers
        )
        usable_pages, self.pool_reason = sizing.pool_pages(
            self.schema,
            free=free // config.shard.size if self.device.type == "cpu" else free,
            weights=loaded.weight_bytes,
            device=self.device,
            mem_fraction=args.mem_fraction_static,
            max_total_tokens=args.max_total_tokens,
            max_running=self.max_slots,
            context_length=config.context_length,
        )
        everyone = group if pipe is None else pipe.everyone
        if everyone is not None:
            usable_pages = int(everyone.all_gather(torch.tensor(usable_pages)).min())
        self.num_pages = usable_pages + 1  # page 0 pads page tables and is never handed out
        moves_pages = args.disaggregation_mode != "null" or args.enable_hierarchical_cache
        if everyone is not None and moves_pages and self.device.type == "cpu":
            self._pool = shared_pool(self.schema, self.num_pages, everyone, config)
        else:
            self._pool = private_pool(self.schema, self.num_pages, self.device, config)
        pool, self.regions = self._pool.own, self._pool.regions
        taken = loaded.weight_bytes + self.num_pages * self.schema.page_bytes
        spare = max(0, free - taken * (config.shard.size if self.device.type == "cpu" else 1))
        self.spare_bytes = spare * config.stage.size  # of all stages, as far as this one can tell
        max_pages = -(-config.context_length // self.schema.page_size)
        table = SlotTable(self.max_slots, max_pages, config.vocab_size, config.eos_token_ids, grammars)
        network = loaded.connect(pool, pipe)
        self.computed_by = loaded.how
        self._runner = PlanRunner(
            network,
            table,
            page_size=self.schema.page_size,
            vocab_size=config.vocab_size,
            chooser=networks.chooser(self.device, config.dtype),
            group=group,
            in_rounds=expert_group is not None,
        )
        _log.info(
            "KV pool: %d pages of %d tokens (%s). Computed by %s with %d threads.",
            self.num_pages,
            self.schema.page_size,
            self.pool_reason,
            loaded.how,
            loaded.threads,
        )

    @property
    def times(self) -> StepTimes:
        """Where the time of the last plan went."""
        return self._runner.times

    def run(self, plan: StepPlan, progress: Progress | None = None) -> StepResult:
        """Execute one plan; see PlanRunner.run."""
        if self.balancer is not None:
            self.balancer.step()
        return self._runner.run(plan, progress)

    def release(self) -> None:
        """Give up the model, and with it all that is shared with other ranks. Pages, slots and packed weights stay."""
        self.expert_layers, self.balancer = (), None
        self._runner.connect(_Released(), in_rounds=False)

    def rejoin(
        self, config: ModelConfig, args: ServerArgs, exchange: ExpertExchange | None, expert_group: Group | None
    ) -> None:
        """Load it again as one of other ranks, of which each computes all but the experts by itself."""
        self.config = config
        spec = models.spec_for(config, args.model_impl)
        loaded = networks.load(config, spec, args, self.device, None, exchange, expert_group, self._packed)
        self._packed = loaded.packed
        self.expert_layers = loaded.expert_layers
        self.balancer = _balancer(args, self.expert_layers, expert_group, self.balanced)
        self._runner.connect(loaded.connect(self._pool.own), in_rounds=expert_group is not None)

    def hold(self, placements: Sequence[Placement]) -> None:
        """Put the experts of all layers there, by layer, as all ranks do between the same two steps."""
        for layer, placement in zip(self.expert_layers, placements, strict=True):
            layer.prepare(placement)()

    def warm_up(self) -> None:
        """Run one prefill and one decode over page 0, so that the first request meets warm kernels."""
        start = SlotStart(0, -1, 1, (0,), SamplingParams(temperature=0.0))
        self.run(StepPlan(-2, 0, (start,), (Row(0, -1, 0, 1, (0,), True, 0, (0,)),)))
        if self.schema.page_size > 1:
            self.run(StepPlan(-1, 0, (), (Row(0, -1, 1, 1, (), True),)))


def _balancer(
    args: ServerArgs, layers: Sequence[ExpertLayer], sharers: Group | None, totals: Totals | None = None
) -> Balancer | None:
    """sharers: the ranks among which experts are; None: one has them all. totals: so far."""
    if not args.enable_eplb or sharers is None or not layers:
        return None
    settings = Balancing(
        every=args.eplb_rebalance_num_iterations,
        chunk=args.eplb_rebalance_layers_per_chunk,
        threshold=args.eplb_min_rebalancing_utilization_threshold,
    )
    return Balancer(layers, sharers, settings, totals)
