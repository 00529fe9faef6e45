"""ModelRunner: loads a model, sizes its KV pool and executes plans over both."""

from __future__ import annotations

import torch

from moonlang.base import log
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.core.kv import KvRegion, KvSchema
from moonlang.core.plan import Row, SlotStart, StepPlan, StepResult
from moonlang.core.ports import GrammarEngine
from moonlang.core.sampling import SamplingParams
from moonlang.model_executor import networks, sizing
from moonlang.model_executor.allocator import keep_freed_memory
from moonlang.model_executor.kv_pool import KvPool
from moonlang.model_executor.plan_runner import PlanRunner, StepTimes
from moonlang.model_executor.progress import Progress
from moonlang.model_executor.slots import SlotTable
from moonlang.model_loader import fingerprint
from moonlang.models import registry as models

_log = log.get(__name__)

_DEFAULT_SLOTS = 256


class ModelRunner:
    """One model on one device.

    schema: layout of a page; num_pages: size of the pool, `pool_reason` says why; max_slots: rows a plan may name;
    region: the pool as other engines see it; computed_by: which kernels compute the model.
    """

    def __init__(self, config: ModelConfig, args: ServerArgs, grammars: GrammarEngine | None = None) -> None:
        self.config = config
        self.device = torch.device(args.device or "cpu")
        self.max_slots = args.max_running_requests or _DEFAULT_SLOTS
        self.vocab_size = config.vocab_size
        keep_freed_memory()
        free = sizing.free_bytes(self.device)
        spec = models.spec_for(config, args.model_impl)
        loaded = networks.load(config, spec, args, self.device)
        weights = fingerprint(config, args.load_format)
        self.schema: KvSchema = spec.kv_schema(config, args.page_size or 1, weights, args.kv_cache_dtype)
        usable_pages, self.pool_reason = sizing.pool_pages(
            self.schema,
            free=free,
            weights=loaded.weight_bytes,
            device=self.device,
            mem_fraction=args.mem_fraction_static,
            max_total_tokens=args.max_total_tokens,
            max_running=self.max_slots,
            context_length=config.context_length,
        )
        self.num_pages = usable_pages + 1  # page 0 pads page tables and is never handed out
        pool = KvPool(self.schema, self.num_pages, self.device)
        self.region: KvRegion = pool.region()
        max_pages = -(-config.context_length // self.schema.page_size)
        table = SlotTable(self.max_slots, max_pages, config.vocab_size, config.eos_token_ids, grammars)
        network = loaded.connect(pool)
        self.computed_by = loaded.how
        self._runner = PlanRunner(
            network,
            table,
            page_size=self.schema.page_size,
            vocab_size=config.vocab_size,
            chooser=networks.chooser(self.device, config.dtype),
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
        return self._runner.run(plan, progress)

    def warm_up(self) -> None:
        """Run one prefill and one decode over page 0, so that the first request meets warm kernels."""
        start = SlotStart(0, -1, 1, (0,), SamplingParams(temperature=0.0))
        self.run(StepPlan(-2, 0, (start,), (Row(0, -1, 0, 1, (0,), True, 0, (0,)),)))
        if self.schema.page_size > 1:
            self.run(StepPlan(-1, 0, (), (Row(0, -1, 1, 1, (), True),)))
