"""Blocks that decoder models share: self-attention, gated feed-forward, and the stack around the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moonlang.attention.batch import AttentionSpec, ForwardContext
from moonlang.config.model_config import ModelConfig
from moonlang.config.shard import Shard
from moonlang.distributed.group import Group
from moonlang.layers.activation import activation
from moonlang.layers.cut import rows
from moonlang.layers.embedding import Embedding
from moonlang.layers.linear import Linear, RowLinear
from moonlang.layers.logits import gathered, logits
from moonlang.layers.norm import GemmaRmsNorm, RmsNorm
from moonlang.layers.rotary import Rotary, rope_parameters, rotate
from moonlang.layers.sinks import Sinks
from moonlang.models.spec import CausalModel
from moonlang.moe.exchange.port import ExpertExchange

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, Value

Norm = RmsNorm | GemmaRmsNorm
Rotation = tuple[Tensor, Tensor]  # cos, sin: [T, 1, D], see Rotary.at

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Attention(nn.Module, ABC):
    """The part of a layer in which tokens meet."""

    @abstractmethod
    def forward(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """x: [T, M] -> [T, M]."""
        ...

    @abstractmethod
    def lower(self, build: Builder, x: Value, rotation: Tensor, residual: Value | None = None) -> Value:
        """forward(x) (+ residual) as kernel calls. rotation: see Rotary.table."""
        ...


class SelfAttention(Attention):
    """Grouped-query attention with rotary positions; q and k normalised per head when `norm` is given.

    A rank has some of the heads, and a copy of the KV heads that they look at.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: torch.dtype,
        spec: AttentionSpec,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        norm: type[Norm] | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        size, self._dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.shard.part(config.num_heads), config.shard.kv_part(config.num_kv_heads)
        self._q, self._kv = len(heads), len(kv_heads)
        self._layer = layer - config.layers.start  # in the pool, which holds those of this stage
        self._spec = spec
        q_rows = rows(heads, config.num_heads, self._dim)
        kv_rows = rows(kv_heads, config.num_kv_heads, self._dim)
        cuts = (q_rows, kv_rows, kv_rows) if config.shard.size > 1 else ()
        self.qkv_proj = Linear(size, (self._q + 2 * self._kv) * self._dim, bias=qkv_bias, dtype=dtype, cuts=cuts)
        inner = config.num_heads * self._dim
        self.o_proj = RowLinear(inner, size, shard=config.shard, bias=out_bias, dtype=dtype)
        eps = config.hf.get("rms_norm_eps", 1e-6)
        self.q_norm = norm(self._dim, eps, dtype) if norm else None
        self.k_norm = norm(self._dim, eps, dtype) if norm else None
        sink_cuts = (rows(heads, config.num_heads),) if config.shard.size > 1 else ()
        self.sinks = Sinks(self._q, dtype, sink_cuts) if sinks else None

    def forward(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """x: [T, M] -> [T, M]."""
        heads = self.qkv_proj(x).view(len(x), -1, self._dim)
        qk, v = heads.split((self._q + self._kv, self._kv), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self._q, self._kv), 1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        q, k = rotate(qk, *rotation).split((self._q, self._kv), 1)
        sinks = None if self.sinks is None else self.sinks.weight
        return self.o_proj(ctx.attend(self._layer, q, k, v, self._spec, sinks).reshape(len(x), -1))

    def lower(self, build: Builder, x: Value, rotation: Tensor, residual: Value | None = None) -> Value:
        """forward(x) (+ residual) as kernel calls. rotation: see Rotary.table."""
        out = build.attend(
            self.qkv_proj.lower(build, x),
            layer=self._layer,
            heads=self._q,
            rotation=rotation,
            scale=self._spec.scale,
            window=self._spec.window,
            softcap=self._spec.softcap,
            q_norm=self.q_norm and self.q_norm.lowered(build),
            k_norm=self.k_norm and self.k_norm.lowered(build),
            sinks=self.sinks and self.sinks.weight,
        )
        return self.o_proj.lower(build, out, residual=residual)


class FeedForward(nn.Module, ABC):
    """The part of a layer in which tokens do not meet."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x: [T, M] -> [T, M]."""
        ...

    @abstractmethod
    def lower(self, build: Builder, x: Value, residual: Value | None = None) -> Value:
        """forward(x) (+ residual) as kernel calls."""
        ...


class GatedMlp(FeedForward):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        act: str,
        bias: bool = False,
        inner: int | None = None,
        shard: Shard | None = None,
    ) -> None:
        """inner: F, when it is not the `intermediate_size` of config.json. shard: when it is not the model's."""
        super().__init__()
        size, width = config.hidden_size, inner or config.hf["intermediate_size"]
        shard = shard or config.dense_shard
        part = shard.part(width)
        self._inner = len(part)
        self._act, self._act_name = activation(act), act
        cuts = (rows(part, width),) * 2 if shard.size > 1 else ()
        self.gate_up_proj = Linear(size, 2 * self._inner, bias=bias, dtype=dtype, cuts=cuts)
        self.down_proj = RowLinear(width, size, shard=shard, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, M] -> [T, M]."""
        gate, up = self.gate_up_proj(x).split(self._inner, -1)
        return self.down_proj(self._act(gate).mul_(up))

    def lower(self, build: Builder, x: Value, residual: Value | None = None) -> Value:
        """forward(x) (+ residual) as kernel calls."""
        inner = self.gate_up_proj.lower(build, x, act=self._act_name)
        return self.down_proj.lower(build, inner, residual=residual)


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): Llama and its descendants."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        attention: Attention,
        mlp: FeedForward,
        norm: type[Norm] = RmsNorm,
    ) -> None:
        super().__init__()
        eps = config.hf.get("rms_norm_eps", 1e-6)
        self.self_attn = attention
        self.mlp: FeedForward = mlp
        self.input_layernorm = norm(config.hidden_size, eps, dtype)
        self.post_attention_layernorm = norm(config.hidden_size, eps, dtype)

    def forward(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """x: [T, M] -> [T, M]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, ctx)
        return x + self.mlp(self.post_attention_layernorm(x))

    def lower(self, build: Builder, x: Value, rotation: Tensor) -> Value:
        """forward as kernel calls."""
        inner = build.norm(x, self.input_layernorm.lowered(build))
        x = self.self_attn.lower(build, inner, rotation, residual=x)
        return self.mlp.lower(build, build.norm(x, self.post_attention_layernorm.lowered(build)), residual=x)


class SandwichLayer(nn.Module):
    """Norms before and after attention and mlp: Gemma 2 and 3."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, attention: SelfAttention, mlp: GatedMlp) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.hf.get("rms_norm_eps", 1e-6)
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = GemmaRmsNorm(size, eps, dtype)
        self.post_attention_layernorm = GemmaRmsNorm(size, eps, dtype)
        self.pre_feedforward_layernorm = GemmaRmsNorm(size, eps, dtype)
        self.post_feedforward_layernorm = GemmaRmsNorm(size, eps, dtype)

    def forward(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """x: [T, M] -> [T, M]."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation, ctx))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

    def lower(self, build: Builder, x: Value, rotation: Tensor) -> Value:
        """forward as kernel calls."""
        inner = self.self_attn.lower(build, build.norm(x, self.input_layernorm.lowered(build)), rotation)
        x = build.norm(inner, self.post_attention_layernorm.lowered(build), residual=x)
        inner = self.mlp.lower(build, build.norm(x, self.pre_feedforward_layernorm.lowered(build)))
        return build.norm(inner, self.post_feedforward_layernorm.lowered(build), residual=x)


class Stack(nn.Module):
    """Embedding, layers and final norm; named `model` in every checkpoint.

    A stage of a pipeline has some of the layers, under the names they have in the whole; the first one begins with the
    embedding, the last one ends with the norm. Where the embedding serves as the head, too, the last one has it also.

    rotaries: one per kind of layer; kinds[i] says which of them layer i uses.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed_tokens: Embedding,
        layers: Sequence[PreNormLayer | SandwichLayer],
        norm: Norm,
        rotaries: Sequence[Rotary],
        kinds: Sequence[int],
        *,
        tied: bool,
    ) -> None:
        super().__init__()
        stage = config.stage
        self._is_first = stage.is_first
        self._size = config.hidden_size
        self.embed_tokens = embed_tokens if stage.is_first or (stage.is_last and tied) else None
        self.layers = nn.ModuleDict({str(i): layers[i] for i in config.layers})
        self.norm = norm if stage.is_last else None
        self._rotaries = rotaries
        self._order = [(layers[i], kinds[i]) for i in config.layers]

    def forward(self, given: Tensor, ctx: ForwardContext) -> Tensor:
        """given: [T], input ids, or [T, M], what the stage before returned -> [T, M], normalised by the last stage."""
        rotations = [rotary.at(ctx.layout.positions) for rotary in self._rotaries]
        x = self.embed_tokens(given) if self.embed_tokens is not None and self._is_first else given
        for layer, kind in self._order:
            x = layer(x, rotations[kind], ctx)
        return x if self.norm is None else self.norm(x)

    def lower(self, build: Builder) -> Value:
        """forward as kernel calls."""
        rotations = [rotary.table() for rotary in self._rotaries]
        first = self.embed_tokens if self._is_first else None
        x = build.given(self._size) if first is None else first.lower(build)
        for layer, kind in self._order:
            x = layer.lower(build, x, rotations[kind])
        return x if self.norm is None else build.norm(x, self.norm.lowered(build))


class Decoder(CausalModel):
    """A stack with a head. Without a head of its own (`tied`) the embedding serves as one.

    Every rank has the whole embedding, which on CPU is the mapped checkpoint, and its share of the head.
    group: the ranks, set when the model is complete; None while there is one.
    """

    group: Group | None = None

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, stack: Stack, *, tied: bool, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.model = stack
        self._is_last = config.stage.is_last
        self._size, self._dtype = config.hidden_size, dtype
        self._vocabulary = config.vocab_size
        self._share = config.shard.part(config.vocab_size)
        cuts = (rows(self._share, config.vocab_size),) if config.shard.size > 1 else ()
        self.lm_head = (
            None
            if tied or not self._is_last
            else Linear(config.hidden_size, len(self._share), bias=False, dtype=dtype, cuts=cuts)
        )
        self._softcap = softcap

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """See `CausalModel.forward`."""
        return self.model(input_ids, ctx)

    def room(self, tokens: int, device: torch.device) -> Tensor:
        """See `CausalModel.room`."""
        return torch.empty(tokens, self._size, dtype=self._dtype, device=device)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `CausalModel.logits`."""
        weight = self._head()
        if self.lm_head is None:
            weight = weight[self._share.start : self._share.stop]
        found = logits(hidden, weight, self._softcap)
        return found if self.group is None else gathered(found, self.group, self._vocabulary)

    def lower(self, build: Builder) -> None:
        """See `CausalModel.lower`."""
        hidden = self.model.lower(build)
        if not self._is_last:
            build.end(hidden)
            return
        whole = self.lm_head is not None or len(self._share) == self._vocabulary
        build.head(hidden, self._head(), self._softcap, self._vocabulary, None if whole else self._share)

    def _head(self) -> Tensor:
        """This rank's share of the head [V, M], or the whole embedding that serves as one."""
        found = self.lm_head or self.model.embed_tokens
        if found is None:
            raise ValueError("Only the last stage has a head.")
        return found.weight

    def join(self, group: Group, exchange: ExpertExchange | None = None) -> None:
        """See `CausalModel.join`."""
        super().join(group, exchange)
        self.group = group


def pre_norm_decoder(
    config: ModelConfig,
    dtype: torch.dtype,
    attentions: Sequence[Attention],
    mlps: Sequence[FeedForward] | None = None,
    rotary: Rotary | None = None,
    norm: type[Norm] = RmsNorm,
) -> Decoder:
    """The whole of a Llama-like model around its attention layers.

    mlps: one per layer; None: dense ones. rotary: when it is not that of whole heads in the model's dtype. norm: of the
    layers.
    """
    hf = config.hf
    if mlps is None:
        act, bias = hf.get("hidden_act", "silu"), bool(hf.get("mlp_bias", False))
        mlps = [GatedMlp(config, dtype, act=act, bias=bias) for _ in attentions]
    tied = bool(hf.get("tie_word_embeddings", False))
    stack = Stack(
        config,
        Embedding(config.vocab_size, config.hidden_size, dtype=dtype),
        [PreNormLayer(config, dtype, *parts, norm) for parts in zip(attentions, mlps, strict=True)],
        norm(config.hidden_size, hf.get("rms_norm_eps", 1e-6), dtype),
        [rotary or Rotary(rope_parameters(hf), config.head_dim, config.context_length, dtype)],
        [0] * len(attentions),
        tied=tied,
    )
    return Decoder(config, dtype, stack, tied=tied)


def sandwich_decoder(
    config: ModelConfig,
    dtype: torch.dtype,
    attentions: Sequence[SelfAttention],
    rotaries: Sequence[Rotary],
    kinds: Sequence[int],
    softcap: float | None,
) -> Decoder:
    """The whole of a Gemma 2 or 3 around its attention layers. rotaries, kinds: see `Stack`; softcap: of the logits."""
    hf = config.hf
    act = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    tied = bool(hf.get("tie_word_embeddings", True))
    stack = Stack(
        config,
        Embedding(config.vocab_size, config.hidden_size, dtype=dtype, scale=config.hidden_size**0.5),
        [SandwichLayer(config, dtype, part, GatedMlp(config, dtype, act=act)) for part in attentions],
        GemmaRmsNorm(config.hidden_size, hf.get("rms_norm_eps", 1e-6), dtype),
        rotaries,
        kinds,
        tied=tied,
    )
    return Decoder(config, dtype, stack, tied=tied, softcap=softcap)
