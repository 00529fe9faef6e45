"""What a checkpoint says of itself: config.json and generation_config.json, read without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moonlang.base.errors import ConfigError
from moonlang.config.quantization import Quantization, read_quantization
from moonlang.config.server_args import ServerArgs
from moonlang.config.shard import WHOLE, Shard
from moonlang.config.stage import ALONE, Stage

_DTYPES = {"half": "float16", "float": "float32"}
_LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")  # attention over a latent per token
_ALLOW_LONGER = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"

# The same size has several names in the config.json of older architectures.
_VOCAB = ("vocab_size",)
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")

# What config.json may leave out because its class in transformers has a default: the defaults that are relied on.
_DEEPSEEK = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_CLASS_DEFAULTS: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768},
    "deepseek_v2": _DEEPSEEK | {"max_position_embeddings": 2048},
    "deepseek_v3": _DEEPSEEK | {"max_position_embeddings": 4096},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "gemma2": {"head_dim": 256, "max_position_embeddings": 8192},
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape and the habits of one checkpoint. Heads, dims and lengths count whole numbers; lengths are tokens."""

    path: str
    hf: dict[str, Any]  # config.json with text_config lifted, class defaults and --json-model-override-args applied
    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of what the pages keep for a KV head
    context_length: int
    dtype: str  # "bfloat16", "float16" or "float32"
    eos_token_ids: tuple[int, ...]
    generation: dict[str, Any]  # generation_config.json, {} when there is none
    quantization: Quantization | None = None  # None: weights are floats
    shard: Shard = WHOLE  # what this process holds of it; the numbers above count the whole
    experts_apart: Shard | None = None  # the same for its experts, when they are spread over more ranks than the rest
    redundant_experts: int = 0  # further copies of experts, over all ranks
    expert_slots: tuple[tuple[int, ...], ...] | None = None  # by rank, the experts there; None: dealt out evenly
    stage: Stage = ALONE  # and of its layers
    dense_whole: bool = False  # every rank has the dense layers of a mixture of experts whole
    latent: bool = False  # pages keep a latent per token for all heads: num_kv_heads is 1, head_dim the latent's size

    @property
    def layers(self) -> range:
        """Those of this process."""
        return self.stage.layers(self.num_layers)

    @property
    def value_dim(self) -> int:
        """Numbers that one head of attention gives."""
        return self.hf["v_head_dim"] if self.latent else self.head_dim

    @property
    def num_experts(self) -> int | None:
        """Experts per layer; None: a dense model."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return next((self.hf[name] for name in names if self.hf.get(name)), None)

    @property
    def experts_per_token(self) -> int:
        """That a token visits, where config.json says so; most models have no more than the default."""
        return self.hf.get("num_experts_per_tok") or 8

    @property
    def expert_shard(self) -> Shard:
        """What this process holds of the experts of a layer."""
        return self.experts_apart or self.shard

    @property
    def copied_experts(self) -> int:
        """Further copies of experts of a layer: none where one process holds all of them."""
        return self.redundant_experts if self.expert_shard.size > 1 else 0

    @property
    def dense_shard(self) -> Shard:
        """What this process holds of a dense feed-forward layer."""
        return WHOLE if self.dense_whole and self.num_experts else self.shard


def load_model_config(path: str, args: ServerArgs) -> ModelConfig:
    """Read the folder `path` under the wishes of `args`. ConfigError when something is missing or cannot be served."""
    folder = Path(path)
    override = msgspec.json.decode(args.json_model_override_args)
    hf = _lifted(_read_object(folder / "config.json") | override) | override
    hf = _CLASS_DEFAULTS.get(str(hf.get("model_type")), {}) | hf
    quantization = read_quantization(hf, args.quantization)
    generation = _read_object(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    hidden, heads = _size(hf, _HIDDEN), _size(hf, _HEADS)
    latent = any(name in _LATENT for name in hf.get("architectures") or ())
    return ModelConfig(
        path=path,
        hf=hf,
        architectures=tuple(hf.get("architectures") or ()),
        model_type=str(hf.get("model_type", "")),
        vocab_size=_size(hf, _VOCAB),
        hidden_size=hidden,
        num_layers=_size(hf, _LAYERS),
        num_heads=heads,
        num_kv_heads=1 if latent else _size(hf, _KV_HEADS, default=1 if hf.get("multi_query") else heads),
        head_dim=_latent_dim(hf) if latent else _size(hf, ("head_dim",), default=hidden // heads),
        context_length=_context_length(hf, args.context_length),
        dtype=_dtype(hf, args.dtype, quantization),
        eos_token_ids=_eos_token_ids(hf, generation),
        generation=generation,
        quantization=quantization,
        latent=latent,
        redundant_experts=args.ep_num_redundant_experts,
        dense_whole=args.moe_dense_tp_size == 1,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.", hint="Give --model-path a complete folder."
        ) from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}.", hint="Fetch the file again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object.", hint="Fetch the file again.")
    return content


def _lifted(hf: dict[str, Any]) -> dict[str, Any]:
    """The language part of a multimodal checkpoint's config, with the architectures of the whole."""
    text = hf.get("text_config")
    if not isinstance(text, dict):
        return hf
    whole = {key: value for key, value in hf.items() if key != "text_config"}
    return whole | text | {"architectures": hf.get("architectures") or text.get("architectures")}


def _size(hf: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    value = next((hf[name] for name in names if hf.get(name) is not None), default)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"config.json gives no usable {names[0]}.",
            hint=f"Add it with --json-model-override-args '{{\"{names[0]}\": ...}}'.",
        )
    return value


def _latent_dim(hf: Mapping[str, Any]) -> int:
    """What MLA keeps of a token: the compressed keys and values, and behind them the rotated part of the keys."""
    return _size(hf, ("kv_lora_rank",)) + _size(hf, ("qk_rope_head_dim",))


def _dtype(hf: Mapping[str, Any], wish: str, quantization: Quantization | None) -> str:
    """--dtype, or what the checkpoint was saved in; a checkpoint that does not say is float32, as in transformers.

    Quantised checkpoints say float16 because their scales are. It has no range to spare for activations and CPUs have
    no arithmetic for it, so they run in bfloat16 unless told otherwise.
    """
    name = wish if wish != "auto" else str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    name = _DTYPES.get(name, name.removeprefix("torch."))
    if wish == "auto" and name == "float16" and quantization is not None and quantization.in_checkpoint:
        return "bfloat16"
    if name not in ("bfloat16", "float16", "float32"):
        raise ConfigError(
            f"The checkpoint's dtype {name} cannot be served.", hint="Add --dtype bfloat16 or --dtype float32."
        )
    return name


def _context_length(hf: Mapping[str, Any], wish: int | None) -> int:
    """--context-length if it is no longer than what the model was made for, else that length."""
    own = _own_context_length(hf)
    if own is None and wish is None:
        raise ConfigError("config.json does not say how long a sequence may be.", hint="Add --context-length.")
    if wish is None or own is None:
        return wish or own or 0
    if wish > own and os.environ.get(_ALLOW_LONGER, "").lower() not in ("1", "true"):
        raise ConfigError(
            f"--context-length {wish} is longer than the {own} tokens that the model was made for.",
            hint=f"Lower it, or set {_ALLOW_LONGER}=1 if you know that the model copes.",
        )
    return wish


def _own_context_length(hf: Mapping[str, Any]) -> int | None:
    """Tokens the positions reach, stretched where rope scaling stretches what `max_position_embeddings` says."""
    length = next((hf[name] for name in _CONTEXT if isinstance(hf.get(name), int)), None)
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    # llama3, longrope and Gemma 3 checkpoints state the stretched length themselves.
    stated = kind not in ("linear", "dynamic", "yarn") or str(hf.get("model_type")).startswith("gemma3")
    if length is None or stated or not rope.get("factor"):
        return length
    base = rope.get("original_max_position_embeddings") or length
    return max(length, int(base * rope["factor"]))


def _eos_token_ids(hf: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a sequence according to either file, without repetition."""
    found: dict[int, None] = {}
    for source in (generation, hf):
        ids = source.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int):
                found[token] = None
    return tuple(found)
