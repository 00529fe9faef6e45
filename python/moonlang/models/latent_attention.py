"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in its absorbed form for every token.

Of a token the pages keep a latent c of R numbers, from which the keys and values of all heads are made, and behind it
Q rotated numbers that are the same in the keys of all heads. Head h has the keys U_h c and the values V_h c, where U_h
and V_h are its rows of kv_b_proj. Since q . (U_h c) = (U_h^T q) . c, queries are brought into the space of latents;
attention then is that of one KV head, whose key is all that is kept of a token and whose value is c; and V_h takes the
result back. Keys and values are never made.

A prefill could make them, with fewer operations for a long chunk. But it would round otherwise: a token would depend on
whether it was computed in a prompt or one by one. So there is one form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moonlang.attention.batch import AttentionSpec, ForwardContext
from moonlang.config.model_config import ModelConfig
from moonlang.layers.cut import Cuts, rows
from moonlang.layers.linear import Linear, Projection, RowLinear
from moonlang.layers.norm import RmsNorm
from moonlang.layers.rotary import Rotary, rope_parameters, rotate, rotate_pairs
from moonlang.models.blocks import Attention, Rotation

if TYPE_CHECKING:
    from moonlang.kernels.program import Builder, Value

_EPS = 1e-6  # of the norms of latents: the authors' constant, whatever `rms_norm_eps` says


class LatentAttention(Attention):
    """Queries come from x directly or, with a `q_lora_rank`, through a latent of their own.

    Neighbouring numbers are rotated as a pair, unless `rope_interleave` says otherwise. A rank has some of the heads,
    and makes all latents.
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        hf, size, shard = config.hf, config.hidden_size, config.shard
        heads, bias = shard.part(config.num_heads), bool(hf.get("attention_bias", False))
        self._layer = layer - config.layers.start  # in the pool, which holds those of this stage
        self._heads = len(heads)
        self._latent, self._rotated = hf["kv_lora_rank"], hf["qk_rope_head_dim"]
        self._plain, self._value = hf["qk_nope_head_dim"], config.value_dim
        self._spec = AttentionSpec(scale=score_scale(hf), value_dim=self._latent)
        self._interleaved = bool(hf.get("rope_interleave", True))

        def cuts(each: int) -> Cuts:
            return (rows(heads, config.num_heads, each),) if shard.size > 1 else ()

        q_rank, q = hf.get("q_lora_rank"), self._plain + self._rotated
        self.q_a_proj = Linear(size, q_rank, bias=bias, dtype=dtype) if q_rank else None
        self.q_a_layernorm = RmsNorm(q_rank, _EPS, dtype) if q_rank else None
        to_q = Linear(q_rank or size, self._heads * q, bias=False, dtype=dtype, cuts=cuts(q))
        self.q_b_proj, self.q_proj = (to_q, None) if q_rank else (None, to_q)
        self.kv_a_proj_with_mqa = Linear(size, self._latent + self._rotated, bias=bias, dtype=dtype)
        self.kv_a_layernorm = RmsNorm(self._latent, _EPS, dtype)
        kv = self._plain + self._value
        self.kv_b_proj = Projection(self._latent, self._heads * kv, bias=False, dtype=dtype, cuts=cuts(kv))
        self.o_proj = RowLinear(config.num_heads * self._value, size, shard=shard, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """See `Attention.forward`."""
        q = self._queries(x).unflatten(-1, (self._heads, -1))
        plain, turned = q.split((self._plain, self._rotated), -1)
        latent, shared = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((self._latent, self._rotated), -1)
        to_latent, to_value = self.kv_b_proj.weight.unflatten(0, (self._heads, -1)).split((self._plain, self._value), 1)
        q = torch.cat((_by_head(plain, to_latent), self._rotate(turned, rotation)), -1)
        k = torch.cat((self.kv_a_layernorm(latent), self._rotate(shared, rotation)), -1)
        out = ctx.attend(self._layer, q, k, None, self._spec)
        return self.o_proj(_by_head(out, to_value.transpose(1, 2)).flatten(1))

    def lower(self, build: Builder, x: Value, rotation: Tensor, residual: Value | None = None) -> Value:
        """See `Attention.lower`."""
        to_latent, to_value = build.head_matrices(
            self.kv_b_proj.weight, self._heads, (self._plain, self._value), transposed=(True, False)
        )
        q = build.by_head(self._queries_lowered(build, x), to_latent, tail=self._rotated)
        out = build.attend_latent(
            q,
            self.kv_a_proj_with_mqa.lower(build, x),
            layer=self._layer,
            heads=self._heads,
            value_dim=self._latent,
            rotation=rotation,
            interleaved=self._interleaved,
            norm=self.kv_a_layernorm.lowered(build),
            scale=self._spec.scale,
        )
        return self.o_proj.lower(build, build.by_head(out, to_value), residual=residual)

    def _queries(self, x: Tensor) -> Tensor:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _queries_lowered(self, build: Builder, x: Value) -> Value:
        if self.q_proj is not None:
            return self.q_proj.lower(build, x)
        assert self.q_a_proj is not None
        assert self.q_a_layernorm is not None
        assert self.q_b_proj is not None
        latent = build.norm(self.q_a_proj.lower(build, x), self.q_a_layernorm.lowered(build))
        return self.q_b_proj.lower(build, latent)

    def _rotate(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x: [T, N, Q], in float32 in between, as the authors do."""
        turn = rotate_pairs if self._interleaved else rotate
        return turn(x.float(), *rotation).to(x.dtype)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """x: [T, H, K], weights: [H, K, N] -> [T, H, N]."""
    return torch.bmm(x.transpose(0, 1), weights).transpose(0, 1)


def latent_rotary(config: ModelConfig) -> Rotary:
    """Of the rotated part of keys and queries."""
    parameters, dim = rope_parameters(config.hf), config.hf["qk_rope_head_dim"]
    return Rotary(parameters, dim, config.context_length, torch.float32)


def score_scale(hf: Mapping[str, Any]) -> float:
    """1 / sqrt(numbers of a key); with yarn times the square of what `mscale_all_dim` makes of its factor."""
    parameters = rope_parameters(hf)
    factor, weight = parameters.get("factor") or 1.0, parameters.get("mscale_all_dim") or 0.0
    grown = 1.0 + 0.1 * weight * math.log(max(factor, 1.0))
    return (hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]) ** -0.5 * grown**2
