"""Any causal language model of `transformers`, with its attention replaced by ours (--model-impl transformers).

The library's modules run as they are over all tokens of the batch at once; its attention interface hands queries, keys
and values to the ForwardContext, so KV lives in our pages. That is right only for models in which tokens meet in
attention and nowhere else, so a model is accepted after it has shown, on a few tokens in mixed chunks, that it computes
the same as on its own. `transformers` is imported when such a model is loaded, not before.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonlang.attention.batch import AttentionSpec, ForwardContext
from moonlang.base.errors import ConfigError
from moonlang.config.model_config import ModelConfig
from moonlang.models.spec import CausalModel, ModelSpec, torch_dtype

_NAME = "moonlang"  # of our attention in the library's registry
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_HINT = "Own model files serve Llama, Mistral, Qwen and Gemma; others need replaceable attention."


class _Attends(Protocol):
    """What the replaced attention needs of a ForwardContext."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor: ...


class _Handover:
    """How the context of the running forward gets past the library's layers, not all of which pass arguments on."""

    def __init__(self) -> None:
        self.context: _Attends | None = None


class TransformersModel(CausalModel):
    """trunk: the library's model up to the last hidden state. head: the whole model, its trunk replaced by a relay."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.trunk = causal.base_model
        setattr(causal, causal.base_model_prefix, _Relay())
        self.head = causal
        self._handover = _Handover()
        for module in self.trunk.modules():
            module.moonlang = self._handover

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """See CausalModel.forward."""
        return self.hidden(input_ids, ctx.layout.positions, ctx)

    def hidden(self, input_ids: Tensor, positions: Tensor, ctx: _Attends) -> Tensor:
        """input_ids, positions: [T] -> [T, M]."""
        self._handover.context = ctx
        out = self.trunk(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """See CausalModel.logits. Whatever the model does to its logits (scaling, capping) is done by the model."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()


class _Hidden:
    """A trunk's output of which a head can read the hidden states only; every other field is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Relay(nn.Module):
    """Stands in for the trunk: what goes in as embeddings comes out as hidden states."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[Tensor, None]:
    """The library's attention signature. query: [1, H, T, D], key, value: [1, K, T, D] -> [1, T, H, D]."""
    if key.shape != value.shape:
        raise _refusal(f"its keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
    if extra.get("is_causal") is False:
        raise _refusal("it attends to later tokens")
    for name in ("s_aux", "position_bias", "head_mask"):
        if extra.get(name) is not None:
            raise _refusal(f"its attention uses {name}")
    window = sliding_window if sliding_window is not None else _window_of(module)
    spec = AttentionSpec(scale=scaling or query.shape[-1] ** -0.5, window=window, softcap=softcap)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return module.moonlang.context.attend(module.layer_idx, q, k, v, spec)[None], None


def _window_of(module: Any) -> int | None:
    """The window of a layer whose model would have expressed it by a mask only."""
    kinds = getattr(module.config, "layer_types", None)
    if not kinds or kinds[module.layer_idx] == "full_attention":
        return None
    if kinds[module.layer_idx] == "sliding_attention":
        return module.config.sliding_window
    raise _refusal(f"layer {module.layer_idx} is of kind {kinds[module.layer_idx]!r}")


def load(config: ModelConfig, load_format: str, device: torch.device) -> CausalModel:
    """The model ready for inference. ConfigError when the library does not know it or its attention is its own."""
    import transformers

    architecture = ", ".join(config.architectures) or config.model_type
    if config.model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"transformers {transformers.__version__} does not know model type {config.model_type!r}.",
            hint="A newer transformers may; models that bring their own code are not run.",
        )
    transformers.AttentionInterface.register(_NAME, paged_attention)
    theirs = transformers.CONFIG_MAPPING[config.model_type].from_dict(dict(config.hf))
    _check_rope(config)
    try:
        causal = _causal(theirs, config, load_format).eval().to(device)
    except ValueError as error:  # the library's word for: no such causal model, or no choice of attention
        raise ConfigError(f"transformers cannot load {architecture}: {error}", hint=_HINT) from error
    except OSError as error:
        hint = "Fetch the whole checkpoint, with its weights in safetensors files."
        raise ConfigError(f"{config.path} cannot be loaded: {error}", hint=hint) from error
    return _accepted(causal, config)


def _causal(theirs: Any, config: ModelConfig, load_format: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype = torch_dtype(config.dtype)
    if load_format == "dummy":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(theirs, dtype=dtype, attn_implementation="eager")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        config.path,
        config=theirs,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    causal, report = loaded
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(f"{config.path} lacks {len(report['missing_keys'])} tensors, for instance {names}.")
    return causal


def _refusal(why: str) -> ConfigError:
    return ConfigError(f"The transformers fallback cannot serve this model: {why}.", hint=_HINT)


def _check_rope(config: ModelConfig) -> None:
    """Refuse rotary embeddings that the library recomputes for the longest sequence of a batch: rows would interact."""
    rope = config.hf.get("rope_parameters") or config.hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    trained = rope.get("original_max_position_embeddings", config.hf.get("original_max_position_embeddings"))
    limit = trained or config.hf.get("max_position_embeddings", 0)
    if kind in _LENGTH_DEPENDENT_ROPE and config.context_length > limit:
        raise ConfigError(
            f"The transformers fallback serves rope type {kind!r} up to {limit} tokens, not {config.context_length}.",
            hint=f"Add --context-length {limit}.",
        )


@torch.inference_mode()
def _accepted(causal: Any, config: ModelConfig) -> TransformersModel:
    """Switch `causal` to our attention, and compare what it computes before and after."""
    device = next(causal.parameters()).device
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(config.vocab_size, (n,), generator=generator).to(device) for n in (5, 3)]
    expected = [causal(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]
    try:
        causal.set_attn_implementation(_NAME)
        model = TransformersModel(causal)
        found = _chunked(model, config, sequences)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise _refusal(f"its attention could not be replaced ({type(error).__name__}: {error})") from error
    for want, got in zip(expected, found, strict=True):
        difference = (want - got).abs().max() / want.abs().max().clamp(min=1e-6)
        if not difference <= _TOLERANCE[torch_dtype(config.dtype)]:
            raise _refusal(f"with paged attention its logits differ by {difference:.1%} from its own")
    return model


def _chunked(model: TransformersModel, config: ModelConfig, sequences: list[Tensor]) -> list[Tensor]:
    """Logits [n, V] of both sequences, computed side by side in chunks."""
    cuts = ((0, 3, 4, 5), (0, 2, 3, 3))
    probe = _Probe(len(sequences))
    found: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(3):
        spans = [(cut[step], cut[step + 1]) for cut in cuts]
        probe.spans = spans
        probe.called.clear()
        ids = torch.cat([ids[a:b] for ids, (a, b) in zip(sequences, spans, strict=True)])
        positions = torch.cat([torch.arange(a, b, device=ids.device) for a, b in spans])
        parts = model.logits(model.hidden(ids, positions, probe)).split([b - a for a, b in spans])
        for rows, part in zip(found, parts, strict=True):
            rows.append(part)
        if sorted(probe.called) != list(range(config.num_layers)):
            raise _refusal(f"{len(probe.called)} of its {config.num_layers} layers use the attention interface")
        if probe.shape != (config.num_kv_heads, config.head_dim):
            raise _refusal(f"its keys have the shape {probe.shape}, and config.json says otherwise")
    return [torch.cat(rows) for rows in found]


class _Probe:
    """Attention over a cache of plain tensors, and a record of who called. spans: positions of each row now."""

    def __init__(self, rows: int) -> None:
        self.spans = [(0, 0)] * rows
        self.called: list[int] = []
        self.shape = (0, 0)
        self._cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """See ForwardContext.attend."""
        self.called.append(layer)
        self.shape = (k.shape[1], k.shape[2])
        out, at = [], 0
        for row, (start, stop) in enumerate(self.spans):
            here = slice(at, at + stop - start)
            old = self._cache.get((layer, row), (k[:0], v[:0]))
            keys, values = torch.cat([old[0], k[here]]), torch.cat([old[1], v[here]])
            self._cache[layer, row] = keys, values
            out.append(_plain_attention(q[here], keys, values, start, spec).to(q.dtype))
            at = here.stop
        return torch.cat(out)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, start: int, spec: AttentionSpec) -> Tensor:
    """q: [n, H, D] at positions from `start` on, k, v: [S, K, D] from position 0 on -> [n, H, D]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1).float() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = q @ k.transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    distance = torch.arange(start, start + q.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = (distance < 0) | (distance >= (spec.window or k.shape[1]))
    return F.softmax(scores.masked_fill(hidden.to(q.device), -torch.inf), -1).matmul(v).transpose(0, 1)


def tiny() -> dict[str, Any]:
    """OLMo 2 normalises queries and keys over all heads at once and has no file of its own here."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def build(config: ModelConfig, dtype: torch.dtype) -> CausalModel:
    """Not used: `load` makes the model, weights included."""
    raise NotImplementedError


SPEC = ModelSpec(architectures=(), build=build, tiny=tiny, load=load)
