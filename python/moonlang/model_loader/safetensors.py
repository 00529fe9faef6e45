"""`--load-format safetensors`: fill a model from a checkpoint folder, single file or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.layers.cut import Cuts
from moonlang.layers.linear import Linear, RowLinear
from moonlang.layers.quantization.w8a8_int8 import Int8Linear, RowInt8Linear
from moonlang.model_loader.cuts import cuts_of
from moonlang.model_loader.parts import Source
from moonlang.model_loader.stacked_experts import StackedExperts
from moonlang.model_loader.weights import WeightSource, as_float, open_weights
from moonlang.models.spec import WeightsMap

_FLOATS = ("F64", "F32", "F16", "BF16")
_HEAD = "lm_head.weight"  # a model reads this one by itself
_SHOWN = 6  # names per kind of mismatch in an error


def fill(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> None:
    """Copy every tensor to its place, converting to the parameter's dtype. The seed is not used.

    Matrices that are, or become, quantised are rounded as their form rounds and then stored as floats: nothing is
    gained in memory or speed, but the numbers are those of the kernels. With quantised activations (w8a8) the module is
    replaced by one that rounds them too. ConfigError naming the tensors that are missing, unexpected, of another shape,
    or not floating point. Nothing is copied then.
    """
    checkpoint = _open(config, weights)
    theirs = {weights.model_name(name): name for name in checkpoint.names()}
    parameters, cuts = dict(model.named_parameters()), cuts_of(model)
    _check(model, weights, config, checkpoint, theirs)
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, parameter in parameters.items():
        sources = [theirs[source] for source in _sources(weights, name, parameter, cuts)]
        if name in linears or parameter.ndim == 3:
            parts = [checkpoint.matrix(source) for source in sources]
        else:
            parts = [checkpoint.tensor(source) for source in sources]
        parts = _cut(parts, _within(name, parameter, cuts))
        at, rows = 0, _rows(parameter)
        for part in parts:
            rows[at : at + part.shape[0]].copy_(as_float(part))
            at += part.shape[0]
        if name.endswith(weights.plus_one):
            parameter.add_(1.0)
        matrices = [part for part in parts if isinstance(part, QuantizedMatrix) and part.kind == "w8a8"]
        if name in linears and len(matrices) == len(parts) and not name.endswith(_HEAD):
            model.set_submodule(name.removesuffix(".weight"), _int8_linear(matrices, linears[name]))


def _open(config: ModelConfig, weights: WeightsMap) -> WeightSource | StackedExperts:
    checkpoint = open_weights(config)
    return StackedExperts(checkpoint, weights.stacked) if weights.stacked else checkpoint


def _int8_linear(parts: list[QuantizedMatrix], linear: Linear) -> Int8Linear:
    """One module for parts that read the same input."""
    whole = QuantizedMatrix(
        kind="w8a8",
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        group=parts[0].group,
    )
    kind = RowInt8Linear if isinstance(linear, RowLinear) and linear.cuts else Int8Linear
    return kind(whole, linear.bias, linear.segments)


def parts(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> Source:
    """For a model without memory: the checkpoint's tensors that make up a parameter, in order.

    They lie over the mapped files, in the checkpoint's dtype; copies are only those that hold 1 + w, in float32, and
    what is dequantised or quantised on the way. ConfigError as in `fill`.
    """
    checkpoint = _open(config, weights)
    theirs = {weights.model_name(name): name for name in checkpoint.names()}
    parameters, cuts = dict(model.named_parameters()), cuts_of(model)
    _check(model, weights, config, checkpoint, theirs)

    def stored(name: str) -> list[str]:
        return [theirs[source] for source in _sources(weights, name, parameters[name], cuts)]

    def tensors(name: str) -> list[Tensor]:
        found = _cut([checkpoint.tensor(each) for each in stored(name)], _within(name, parameters[name], cuts))
        return [tensor.float() + 1.0 for tensor in found] if name.endswith(weights.plus_one) else found

    def matrices(name: str) -> list[Tensor | QuantizedMatrix]:
        return _cut([checkpoint.matrix(each) for each in stored(name)], _within(name, parameters[name], cuts))

    def expert(name: str, number: int) -> list[Tensor | QuantizedMatrix]:
        if parameters[name].ndim == 3:
            return [checkpoint.matrix(theirs[source]) for source in weights.sources(name, (number,))]
        return [checkpoint.tensor(theirs[name])[number]]

    return Source(tensors, matrices, expert)


def _sources(weights: WeightsMap, name: str, parameter: Tensor, cuts: dict[str, Cuts]) -> tuple[str, ...]:
    """See WeightsMap.sources; of this rank's experts, where `parameter` is theirs."""
    cut = cuts[name][0] if parameter.ndim == 3 and name in cuts else None
    return weights.sources(name, range(len(parameter)) if cut is None else cut.part)


def _within(name: str, parameter: Tensor, cuts: dict[str, Cuts]) -> Cuts:
    """How the tensors of a parameter are cut: those of experts are whole, there are only fewer of them."""
    return () if parameter.ndim == 3 else cuts.get(name, ())


def _cut(parts: list[Any], cuts: Cuts) -> list[Any]:
    """What this rank holds of each tensor."""
    return [cut.of(part) for part, cut in zip(parts, cuts, strict=True)] if cuts else parts


def _check(
    model: nn.Module,
    weights: WeightsMap,
    config: ModelConfig,
    checkpoint: WeightSource | StackedExperts,
    theirs: dict[str, str],
) -> None:
    missing, shapes, dtypes = [], [], []
    cuts = cuts_of(model)
    wanted: set[str] = set()
    for name, parameter in model.named_parameters():
        sources, within = _sources(weights, name, parameter, cuts), _within(name, parameter, cuts)
        wanted.update(sources)
        if parameter.ndim == 3 and name in cuts:
            wanted.update(weights.sources(name, range(cuts[name][0].whole)))  # the experts of other ranks
        found = [theirs[source] for source in sources if source in theirs]
        missing += [source for source in sources if source not in theirs]
        dtypes += [f"{source} ({kind})" for source in found if (kind := checkpoint.dtype(source)) not in _FLOATS]
        have = [checkpoint.shape(source) for source in found]
        held = have
        if within and len(found) == len(sources):
            held = [cut.shape(shape) for cut, shape in zip(within, have, strict=True)]
        if len(found) == len(sources) and _stacked(held) != tuple(_rows(parameter).shape):
            shapes.append(
                f"{' + '.join(found)} is {' + '.join(map(str, have))}, config.json implies {tuple(parameter.shape)}"
            )
    tied = {_HEAD} if config.hf.get("tie_word_embeddings", True) else set()
    # What the other stages of a pipeline have cannot be told from what nobody wants.
    unexpected = [
        name
        for name, stored in theirs.items()
        if config.stage.size == 1
        and name not in wanted | tied
        and not weights.is_ignored(name, config.num_layers)
        and not checkpoint.is_optional(stored)
    ]
    problems = [
        f"{len(names)} {what}: {'; '.join(names[:_SHOWN])}{'; ...' if len(names) > _SHOWN else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("not floating point", dtypes),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"The tensors in {config.path} do not fit {', '.join(config.architectures)}. {'. '.join(problems)}.",
            hint=_hint(missing, dtypes, config),
        )


def _rows(parameter: Tensor) -> Tensor:
    """The parameter as the loader fills it, a view: the experts [E, N, K] of a layer one below the other."""
    return parameter.flatten(0, 1) if parameter.ndim == 3 else parameter


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the concatenation along dimension 0; None when the shapes cannot be concatenated."""
    if any(shape[1:] != shapes[0][1:] or not shape for shape in shapes):
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _hint(missing: list[str], dtypes: list[str], config: ModelConfig) -> str:
    if dtypes:
        return "The checkpoint is quantised in a way that its config.json does not name: take the original one."
    if missing == [_HEAD]:
        return "If the model shares its head with the embedding, set tie_word_embeddings in config.json."
    return (
        "config.json and the weights belong to different models or revisions; --model-impl transformers may know more."
    )


BACKEND = fill
