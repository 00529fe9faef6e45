"""What the rest of the engine knows of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moonlang.attention.batch import ForwardContext
from moonlang.base.errors import BugError, ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.core.kv import ELEMENTS, KvSchema
from moonlang.distributed.group import Group
from moonlang.layers.linear import RowLinear
from moonlang.layers.quantization.w8a8_int8 import RowInt8Linear
from moonlang.moe.exchange.port import ExpertExchange
from moonlang.moe.experts import Experts

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder


class CausalModel(nn.Module, ABC):
    """The interface of a model. Weights are uninitialised until a loader has filled every parameter."""

    @abstractmethod
    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """input_ids: [T] int64 in the row order of ctx.layout -> hidden states [T, M], ready for `logits`.

        A stage of a pipeline but the first takes the hidden states of the one before; all but the last return theirs.
        """
        ...

    def room(self, tokens: int, device: torch.device) -> Tensor:
        """Uninitialised memory for what the stage before hands over: [T, M]."""
        raise BugError("This model is not cut into stages.")

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, M], any of the rows that forward returned -> [N, V] float32."""
        ...

    def join(self, group: Group, exchange: ExpertExchange | None = None) -> None:
        """Compute together with the ranks of `group`, which hold the other shards of this model.

        exchange: what carries tokens to their experts; None: all ranks have all tokens.
        """
        for module in self.modules():
            # A RowLinear without cuts is whole in every rank: an expert that all tokens visit.
            if isinstance(module, RowInt8Linear | Experts) or (isinstance(module, RowLinear) and module.cuts):
                module.group = group
            if isinstance(module, Experts):
                module.exchange = exchange

    def join_experts(self, group: Group, exchange: ExpertExchange, peers: Group | None) -> None:
        """Share experts with the ranks of `group`, which have tokens of their own; those of `peers` have the same."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.group, module.exchange, module.own_tokens, module.peers = group, exchange, True, peers

    def lower(self, build: Builder) -> None:
        """Write forward and logits down as kernel calls, ending with `build.head`; or call `build.refuse`."""
        build.refuse("its forward is not made of our blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsMap:
    """From a model's parameters to the checkpoint's tensors.

    A parameter takes the tensor of its own name, unless one of its name's parts is in `fused`: then it is the
    concatenation, along dimension 0, of the tensors whose names have that part replaced by each entry in turn.

    A parameter "experts.NAME" of shape [E, ...] with NAME in `experts` holds, for each expert in turn, the tensors
    "experts.<i>.<part>.weight" of its parts, one after the other. Where the checkpoint has NAME in `stacked`, it holds
    the experts of a layer in one tensor, which `model_loader.stacked_experts` takes apart.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()  # (prefix in the checkpoint, prefix in the model), first match applies
    renamed: tuple[tuple[str, str], ...] = ()  # (part of a name in the checkpoint, in the model), all apply
    ignored: tuple[str, ...] = ()  # tensors whose (renamed) name starts with or ends in one of these are not for us
    layers: str = ""  # what the names of layers begin with; those beyond the model's number (MTP) are not for us
    plus_one: tuple[str, ...] = ()  # parameters with these endings hold 1 + the tensor

    def model_name(self, tensor: str) -> str:
        """The name that the checkpoint's tensor has in the model."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(theirs, ours)
        for theirs, ours in self.prefixes:
            if tensor.startswith(theirs):
                return ours + tensor[len(theirs) :]
        return tensor

    def is_ignored(self, name: str, num_layers: int) -> bool:
        """name: in the model's naming. num_layers: that the model has."""
        if self.layers and name.startswith(self.layers):
            layer = name[len(self.layers) :].partition(".")[0]
            if layer.isdigit() and int(layer) >= num_layers:
                return True
        return name.startswith(self.ignored) or name.endswith(self.ignored)

    def sources(self, parameter: str, experts: Iterable[int]) -> tuple[str, ...]:
        """The names, in the model's naming, of what makes up `parameter`, in order. experts: those in its dimension 0,
        if it is a parameter of experts.
        """
        head, _, rest = parameter.rpartition(".")
        parent, _, last = head.rpartition(".")
        if last == "experts" and rest in self.experts:
            return tuple(f"{head}.{i}.{part}.weight" for i in experts for part in self.experts[rest])
        if last not in self.fused:
            return (parameter,)
        return tuple(f"{parent}.{part}.{rest}" for part in self.fused[last])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model file.

    build(config, dtype): the module with uninitialised weights, on torch's current default device.
    tiny(): a config.json for tests, small but with every feature of the architecture in use.
    load(config, load_format, device): for a model whose weights somebody else loads; `weights` is then not used.
    """

    architectures: tuple[str, ...]
    build: Callable[[ModelConfig, torch.dtype], CausalModel]
    tiny: Callable[[], dict[str, Any]]
    weights: WeightsMap = WeightsMap()
    load: Callable[[ModelConfig, str, torch.device], CausalModel] | None = None

    def kv_schema(self, config: ModelConfig, page_size: int, fingerprint: str = "", kv_dtype: str = "auto") -> KvSchema:
        """The page layout of this model, with the heads of its shard and the layers of its stage.

        fingerprint: `model_loader.fingerprint` of the weights. kv_dtype: what --kv-cache-dtype says; auto: the model's.
        """
        dtype, itemsize, scale_bytes = ELEMENTS[config.dtype if kv_dtype == "auto" else kv_dtype]
        return KvSchema(
            num_layers=len(config.layers),
            num_kv_heads=len(config.shard.kv_part(config.num_kv_heads)),
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=dtype,
            itemsize=itemsize,
            scale_bytes=scale_bytes,
            latent=config.latent,
            fingerprint=fingerprint,
        )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that `--dtype` calls `name`; ConfigError for one no model runs in."""
    if name not in _DTYPES:
        raise ConfigError(f"Models cannot run in dtype {name!r}.", hint=f"Choose one of: {', '.join(_DTYPES)}.")
    return _DTYPES[name]
