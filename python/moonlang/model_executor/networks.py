"""Loading a model for the path that computes it: the program of the CPU kernels where it can be, torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from moonlang.base import log, registry
from moonlang.config.experts import is_elastic
from moonlang.config.host import cpu_kernels
from moonlang.config.model_config import ModelConfig
from moonlang.config.server_args import ServerArgs
from moonlang.distributed.group import Group
from moonlang.distributed.pipe import Pipe
from moonlang.kernels.table import CPU, TORCH, Facts, choose
from moonlang.layers.token_choice import Chooser, NumpyChooser
from moonlang.model_executor.buckets import bucket, exact
from moonlang.model_executor.expert_layers import TorchExperts
from moonlang.model_executor.kv_pool import KvPool
from moonlang.model_executor.plan_runner import Network
from moonlang.model_executor.threads import limit_threads
from moonlang.model_executor.torch_network import TorchNetwork
from moonlang.model_loader import expert_loader, load_model
from moonlang.models.spec import CausalModel, ModelSpec
from moonlang.moe.eplb import ExpertLayer
from moonlang.moe.exchange.port import ExpertExchange
from moonlang.moe.experts import Experts

if TYPE_CHECKING:
    from moonlang.kernels.expert_weights import Packed

_log = log.get(__name__)


class Loaded(Protocol):
    """A model with its weights, which awaits its pool, and its neighbours if it is a stage of a pipeline.

    how: what computes it, with how many threads. expert_layers: those that can be placed anew, where that is wanted.
    packed: of a program in an elastic server, what `load` takes as `before`.
    """

    weight_bytes: int
    threads: int
    how: str
    expert_layers: Sequence[ExpertLayer]
    packed: Packed | None

    def connect(self, pool: KvPool, pipe: Pipe | None = None) -> Network: ...


class LoadedTorch:
    """See Loaded. attention: name of the backend."""

    def __init__(
        self,
        model: CausalModel,
        attention: str,
        device: torch.device,
        processes: int = 1,
        expert_layers: Sequence[ExpertLayer] = (),
    ) -> None:
        """processes: how many share the cores."""
        self.expert_layers = expert_layers
        self.packed: Packed | None = None
        self.weight_bytes = sum(weight.nbytes for weight in model.parameters())
        self.threads = limit_threads(processes)
        self.how = f"torch, attention {attention}"
        self._model = model
        self._backend = registry.find("attention", attention).BACKEND()
        self._device = device

    def connect(self, pool: KvPool, pipe: Pipe | None = None) -> TorchNetwork:
        rounded = bucket if self._device.type == "cpu" and pool.schema.itemsize == 2 else exact
        return TorchNetwork(self._model, pool, self._backend, self._device, rounded, pipe)


def chooser(device: torch.device, dtype: str) -> Chooser:
    """What makes tokens of logits."""
    facts = Facts(device=device.type, dtype=dtype, isa=cpu_kernels(), attention_backend="")
    if choose("sampling", facts).implementation == TORCH:
        return NumpyChooser()
    from moonlang.kernels.token_choice import KernelChooser

    return KernelChooser()


def load(
    config: ModelConfig,
    spec: ModelSpec,
    args: ServerArgs,
    device: torch.device,
    group: Group | None = None,
    exchange: ExpertExchange | None = None,
    expert_group: Group | None = None,
    before: Packed | None = None,
) -> Loaded:
    """The model, loaded by the path that `kernels.table` chooses. ConfigError when the checkpoint does not fit.

    group: those who hold the other shards. exchange: what carries tokens to the experts that those hold. expert_group:
    those among whom it does so, when not all of them have the same tokens. before: what was packed for the same model
    with other experts.
    """
    attention = args.attention_backend or "torch_native"
    facts = Facts(
        device=device.type,
        dtype=config.dtype,
        isa=cpu_kernels(),
        attention_backend=attention,
        own_model=spec.load is None,
    )
    chosen = choose("forward", facts)
    if device.type == "cpu" and not facts.isa:
        _log.warning("The CPU kernels are not installed: torch computes, several times slower. See scripts/setup.")
    groups = [one for one in (group, expert_group) if one is not None]
    if chosen.implementation == CPU and all(one.native is not None for one in groups):
        loaded = _program(config, spec, args, group, exchange, expert_group, before)
        if loaded is not None:
            return loaded
    model = load_model(config, spec, args.load_format, device)
    if group is not None:
        model.join(group, exchange)
    if expert_group is not None and exchange is not None:
        model.join_experts(expert_group, exchange, group)
    layers: list[ExpertLayer] = []
    if args.enable_eplb and spec.load is None:
        one = expert_loader(model, config, spec, args.load_format)
        experts = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
        layers = [TorchExperts(module, name, one) for name, module in experts]
    return LoadedTorch(model, attention, device, processes(config, args), layers)


def processes(config: ModelConfig, args: ServerArgs) -> int:
    """How many share the cores of this host, as far as this server knows."""
    return config.shard.size * config.stage.size * args.dp_size


def _program(
    config: ModelConfig,
    spec: ModelSpec,
    args: ServerArgs,
    group: Group | None,
    exchange: ExpertExchange | None,
    expert_group: Group | None,
    before: Packed | None,
) -> Loaded | None:
    """None, and a line in the log, when the model has a part without a kernel."""
    from moonlang.kernels.program import NotLowerableError
    from moonlang.model_executor import program_network

    try:
        shared_by = processes(config, args)
        return program_network.load(
            config,
            spec,
            args.load_format,
            group,
            exchange,
            expert_group,
            shared_by,
            movable=args.enable_eplb,
            keep=is_elastic(args),
            before=before,
        )
    except NotLowerableError as why:
        _log.warning("Torch computes this model: %s.", why)
        return None
