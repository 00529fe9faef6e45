"""What the rest of the engine knows of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moonlang.attention.batch import ForwardContext
from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.core.kv import ELEMENTS, KvSchema
from moonlang.distributed.group import Group
from moonlang.layers.linear import RowLinear
from moonlang.moe.experts import Experts

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder


class CausalModel(nn.Module):
    """The interface of a model. Weights are uninitialised until a loader has filled every parameter."""

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """input_ids: [T] int64 in the row order of ctx.layout -> hidden states [T, M], ready for `logits`."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, M], any of the rows that forward returned -> [N, V] float32."""
        raise NotImplementedError

    def join(self, group: Group) -> None:
        """Compute together with the ranks of `group`, which hold the other shards of this model."""
        for module in self.modules():
            if isinstance(module, RowLinear | Experts):
                module.group = group

    def lower(self, build: Builder) -> None:
        """Write forward and logits down as kernel calls, ending with `build.head`; or call `build.refuse`."""
        build.refuse("its forward is not made of our blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsMap:
    """From a model's parameters to the checkpoint's tensors.

    A parameter takes the tensor of its own name, unless one of its name's parts is in `fused`: then it is the
    concatenation, along dimension 0, of the tensors whose names have that part replaced by each entry in turn.

    A parameter "experts.NAME" of shape [E, ...] with NAME in `experts` holds, for each expert in turn, the tensors
    "experts.<i>.<part>.weight" of its parts, one after the other.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()  # (prefix in the checkpoint, prefix in the model), first match applies
    renamed: tuple[tuple[str, str], ...] = ()  # (part of a name in the checkpoint, in the model), all apply
    ignored: tuple[str, ...] = ()  # tensors whose (renamed) name starts with or ends in one of these are not for us
    plus_one: tuple[str, ...] = ()  # parameters with these endings hold 1 + the tensor

    def model_name(self, tensor: str) -> str:
        """The name that the checkpoint's tensor has in the model."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(theirs, ours)
        for theirs, ours in self.prefixes:
            if tensor.startswith(theirs):
                return ours + tensor[len(theirs) :]
        return tensor

    def is_ignored(self, name: str) -> bool:
        return name.startswith(self.ignored) or name.endswith(self.ignored)

    def sources(self, parameter: str, length: int, first: int = 0) -> tuple[str, ...]:
        """The names, in the model's naming, of what makes up `parameter`, in order.

        length: its dimension 0. first: the expert that it begins with.
        """
        head, _, rest = parameter.rpartition(".")
        parent, _, last = head.rpartition(".")
        if last == "experts" and rest in self.experts:
            return tuple(
                f"{head}.{i}.{part}.weight" for i in range(first, first + length) for part in self.experts[rest]
            )
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
        """The page layout of this model, with the heads of its shard.

        fingerprint: `model_loader.fingerprint` of the weights. kv_dtype: what --kv-cache-dtype says; auto: the model's.
        """
        dtype, itemsize, scale_bytes = ELEMENTS[config.dtype if kv_dtype == "auto" else kv_dtype]
        return KvSchema(
            num_layers=config.num_layers,
            num_kv_heads=len(config.shard.kv_part(config.num_kv_heads)),
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=dtype,
            itemsize=itemsize,
            scale_bytes=scale_bytes,
            fingerprint=fingerprint,
        )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that `--dtype` calls `name`; ConfigError for one no model runs in."""
    if name not in _DTYPES:
        raise ConfigError(f"Models cannot run in dtype {name!r}.", hint=f"Choose one of: {', '.join(_DTYPES)}.")
    return _DTYPES[name]
