"""`--load-format safetensors`: fill a model from a checkpoint folder, single file or sharded."""

from __future__ import annotations

from torch import Tensor, nn

from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.model_loader.checkpoint import Checkpoint
from moonlang.models.spec import WeightsMap

_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 6  # names per kind of mismatch in an error


def fill(model: nn.Module, weights: WeightsMap, config: ModelConfig, seed: int) -> None:
    """Copy every tensor to its place, converting to the parameter's dtype. The seed is not used.

    ConfigError naming the tensors that are missing, unexpected, of another shape, or not floating point. Nothing is
    copied then.
    """
    checkpoint = Checkpoint(config.path)
    theirs = {weights.model_name(name): name for name in checkpoint.names()}
    parameters = dict(model.named_parameters())
    _check(model, weights, config, checkpoint, theirs)
    for name, parameter in parameters.items():
        at, rows = 0, _rows(parameter)
        for source in weights.sources(name, len(parameter)):
            tensor = checkpoint.tensor(theirs[source])
            rows[at : at + len(tensor)].copy_(tensor)
            at += len(tensor)
        if name.endswith(weights.plus_one):
            parameter.add_(1.0)


def _check(
    model: nn.Module, weights: WeightsMap, config: ModelConfig, checkpoint: Checkpoint, theirs: dict[str, str]
) -> None:
    missing, shapes, dtypes = [], [], []
    wanted: set[str] = set()
    for name, parameter in model.named_parameters():
        sources = weights.sources(name, len(parameter))
        wanted.update(sources)
        found = [theirs[source] for source in sources if source in theirs]
        missing += [source for source in sources if source not in theirs]
        dtypes += [f"{source} ({kind})" for source in found if (kind := checkpoint.dtype(source)) not in _FLOATS]
        have = [checkpoint.shape(source) for source in found]
        if len(found) == len(sources) and _stacked(have) != tuple(_rows(parameter).shape):
            shapes.append(
                f"{' + '.join(found)} is {' + '.join(map(str, have))}, config.json implies {tuple(parameter.shape)}"
            )
    tied = {"lm_head.weight"} if config.hf.get("tie_word_embeddings", True) else set()
    unexpected = [name for name in theirs if name not in wanted | tied and not weights.is_ignored(name)]
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
    if dtypes or "quantization_config" in config.hf:
        return "The checkpoint is quantised, which is not supported yet: take the original bfloat16 one."
    if missing == ["lm_head.weight"]:
        return "If the model shares its head with the embedding, set tie_word_embeddings in config.json."
    return (
        "config.json and the weights belong to different models or revisions; --model-impl transformers may know more."
    )


BACKEND = fill
