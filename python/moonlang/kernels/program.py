"""Writes a model down as a `Program`: a list of kernel calls that runs without Python.

A block of `models` lowers itself: its method `lower(build, x, ...)` reads like its `forward`, with values that stand
for rows of numbers instead of tensors. `Builder.finish` then gives every value a place in memory and makes the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NoReturn, Protocol

import torch
from sgl_kernel import moe
from sgl_kernel.cache import PackedWeights, Unkept
from sgl_kernel.program import PackedWeight, Program
from sgl_kernel.ranks import Ranks
from torch import Tensor

from moonlang.kernels.expert_weights import BuiltExperts, ExpertParts, ExpertWeights, Packed, Placed, native
from moonlang.kernels.matrix import QuantizedMatrix
from moonlang.kernels.packing import pack
from moonlang.kernels.placing import Emit, Op, Value, keep_few, place

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_KINDS = {"float32": "f32", "bfloat16": "bf16"}
_NONE = -1


class NotLowerableError(Exception):
    """A block that has no kernel; the text says which and why. The model runs on torch then."""


@dataclass(frozen=True, slots=True)
class NormWeight:
    """An RMS norm. form "llama": rounded, then times weight [n], both in the dtype; "gemma": all in float32."""

    weight: Tensor
    eps: float
    form: str


class Parts(ExpertParts, Protocol):
    """The tensors that make up a parameter, one below the other, as they lie in the checkpoint: model_loader.parts."""

    def __call__(self, parameter: Tensor) -> Sequence[Tensor]: ...

    def matrices(self, parameter: Tensor) -> Sequence[Any]:
        """Of a matrix that is multiplied by: tensors, or quantised matrices."""
        ...


class Builder:
    """Collects kernel calls.

    dtype: of the values, "float32", "bfloat16" or "float16". packed: where weights packed before may lie. ranks: those
    who hold the other shards of the model. lanes: what carries tokens to their experts (`ExpertExchange.native`).
    expert_ranks: those who hold the other experts, when they have tokens of their own, unlike those of `ranks`.
    movable: whether experts may be replaced one by one later; layers: those that have any, in order. before: what a
    builder of the same model had made; made: the same of this one.
    """

    def __init__(
        self,
        dtype: str,
        parts: Parts,
        packed: PackedWeights | None = None,
        ranks: Ranks | None = None,
        lanes: Sequence[Any] = (),
        expert_ranks: Ranks | None = None,
        *,
        movable: bool = False,
        before: Packed | None = None,
    ) -> None:
        self.dtype = dtype
        self.made = Packed()
        self._before = before
        self.layers: list[BuiltExperts] = []
        self._movable = movable
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._parts = parts
        self._packed = packed or Unkept()
        self._ranks = ranks
        self._lanes = lanes
        self._expert_ranks = expert_ranks
        self._weight_bytes = 0
        self._ops: list[Op] = []
        self._head: Callable[[Program, int], None] | None = None
        self._head_parameter: Tensor | None = None
        self._head_weight: PackedWeight | None = None
        self._hidden: Value | None = None

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights so far."""
        return self._weight_bytes

    def refuse(self, why: str) -> NoReturn:
        """Stop lowering: the model runs on torch, and says `why`."""
        raise NotLowerableError(why)

    def matrix(
        self, parameter: Tensor, *, gated: bool = False, kind: str | None = None, segments: int = 1
    ) -> PackedWeight:
        """The parameter [N, K] packed. gated: it is a gate above an up, for `linear` with an activation.

        kind: "f32" or "bf16", the dtype's when None. segments: of the sums over K.
        """
        parts = self._parts if kind else self._parts.matrices
        return self._pack(lambda: parts(parameter), gated=gated, kind=kind, segments=segments)

    def _pack(
        self,
        parts: Callable[[], Sequence[Any]],
        *,
        gated: bool = False,
        kind: str | None = None,
        segments: int = 1,
    ) -> PackedWeight:
        """parts: not asked for when the weight has been packed before, since they may have to be quantised first."""
        wanted = kind or self._kind()
        if self._before is not None:
            weight = self._before.dense[len(self.made.dense)]
        else:
            weight = self._packed.weight(
                lambda arena: pack(parts(), kind=wanted, gated=gated, arena=arena, segments=segments)
            )
        self.made.dense.append(weight)
        self._weight_bytes += weight.bytes
        return weight

    def _kind(self) -> str:
        """Of weights that are not quantised."""
        if self.dtype not in _KINDS:
            self.refuse(f"the kernels keep no weights in {self.dtype}")
        return _KINDS[self.dtype]

    def _kernel_act(self, act: str) -> str:
        if act not in ACTIVATIONS:
            self.refuse(f"there is no kernel for the activation {act!r}")
        return ACTIVATIONS[act]

    def vector(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter [n] in `dtype`, float32 when None."""
        return torch.cat([part.to(dtype or torch.float32) for part in self._parts(parameter)])

    def norm_weight(self, parameter: Tensor, eps: float, form: str) -> NormWeight:
        """See NormWeight."""
        return NormWeight(self.vector(parameter, self._torch_dtype if form == "llama" else None), eps, form)

    def embed(self, parameter: Tensor, scale: float | None) -> Value:
        """The rows of the parameter [V, M] that the input ids name, times `scale`.

        A head over the same parameter serves as the table too, unless it is quantised.
        """

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            shared = self._head_weight if self._head_parameter is parameter else None
            if shared is not None and shared.kind == _KINDS[self.dtype]:
                program.embed_packed(out, shared, scale or 1.0)
                return
            parts = [part.to(self._torch_dtype) for part in self._parts(parameter)]
            table = torch.cat(parts) if len(parts) > 1 else parts[0]  # one that needs no change stays mapped
            self._weight_bytes += table.nbytes
            program.embed(out, table, scale or 1.0)

        return self._add((), parameter.shape[1], emit)

    def given(self, columns: int) -> Value:
        """The hidden states of all tokens, where another program has computed the layers before."""

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.given(out, columns)

        return self._add((), columns, emit)

    def norm(self, x: Value, norm: NormWeight, residual: Value | None = None) -> Value:
        """norm(x) (+ residual)."""

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            if residual is not None and ids[1] != out:
                raise ValueError("The residual of a norm is read again: it cannot be added to in place.")
            program.norm(ids[0], out, norm.weight, norm.eps, norm.form, residual is not None)

        return self._add((x, residual), x.columns, emit, over=residual)

    def linear(
        self,
        x: Value,
        weight: PackedWeight,
        *,
        bias: Tensor | None = None,
        residual: Value | None = None,
        act: str | None = None,
        shared: bool = False,
    ) -> Value:
        """x W^T + bias (+ residual). act: the weight is gated, and act(gate) * up of half as many columns comes out.

        shared: x and weight are this rank's share; x W^T is added up over all ranks.
        """
        kernel_act = "" if act is None else self._kernel_act(act)
        ranks = self._ranks if shared else None

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.linear(ids[0], out, weight, bias, ids[1], kernel_act, ranks)

        return self._add((x, residual), weight.n // (2 if act else 1), emit, over=residual)

    def experts(
        self,
        x: Value,
        *,
        router: Tensor,
        router_bias: Tensor | None = None,
        choice_bias: Tensor | None = None,
        gate_up: Tensor,
        down: Tensor,
        placement: Placed,
        held: Sequence[int],
        act: str,
        gating: Mapping[str, Any],
        biases: tuple[Tensor, Tensor] | None = None,
        bounds: tuple[float, float] | None = None,
        shared: tuple[Tensor, Tensor] | None = None,
        shared_gate: Tensor | None = None,
        residual: Value | None = None,
    ) -> Value:
        """A mixture of experts (+ residual). router: [E, M], kept in float32. gate_up: [E, 2F, M], down: [E, M, F].
        router_bias: [E]. choice_bias: [E], added to the scores for the choice. biases: [E, 2F] and [E, M] of gate_up
        and down. bounds: alpha and limit of the activation "bounded".

        placement: where all experts are, which matters when tokens travel; held: those of this rank, whose parameters
        these are. gating: arguments of `sgl_kernel.moe.gating`. shared: gate_up and down of an expert that every token
        visits, weighted by the sigmoid of `shared_gate` [1, M].
        """
        scores = self.matrix(router, kind="f32")
        weights = ExpertWeights(
            parts=self._parts,
            gate_up=gate_up,
            down=down,
            kind=self._kind(),
            biases=biases,
            bounds=bounds,
            apart=self._movable,
        )
        here = {} if self._before is None else self._before.experts[len(self.made.experts)]
        pairs = [here.get(expert) or weights.packed(expert, self._packed) for expert in held]
        self.made.experts.append(dict(zip(held, pairs, strict=True)))
        self._weight_bytes += sum(up.bytes + down.bytes for up, down in pairs)
        layer = moe.moe(
            router=scores if router_bias is None else scores.with_bias(self.vector(router_bias)),
            router_bias=() if choice_bias is None else self.vector(choice_bias).tolist(),
            gate_up=[up for up, _ in pairs],
            down=[down for _, down in pairs],
            gating=moe.gating(**gating),
            act=self._kernel_act(act) if bounds is None else "bounded",
            shared=() if shared is None else (self.matrix(shared[0], gated=True), self.matrix(shared[1])),
            shared_gate=None if shared_gate is None else self.matrix(shared_gate, kind="f32"),
            ranks=self._expert_ranks or self._ranks,
            lanes=self._lanes,
            placement=native(placement) if self._lanes else None,
            **({} if self._expert_ranks is None else {"own_tokens": True, "peers": self._ranks}),
        )

        self.layers.append(BuiltExperts(layer, placement, weights, pairs))

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.experts(ids[0], out, layer, ids[1])

        return self._add((x, residual), x.columns, emit, over=residual)

    def attend(
        self,
        qkv: Value,
        *,
        layer: int,
        heads: int,
        rotation: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        q_norm: NormWeight | None = None,
        k_norm: NormWeight | None = None,
        sinks: Tensor | None = None,
    ) -> Value:
        """qkv: [T, (H + 2K) D], rotated and stored in the pool, then attended: [T, H D].

        heads: H. rotation: [positions, D] float32, the cosines of the first half of a head, then its sines. q_norm,
        k_norm: of each head of q and k, before the rotation. sinks: [H], scores of a key without a value.
        """
        dim, scores = rotation.shape[1], None if sinks is None else self.vector(sinks)

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.attend(
                ids[0],
                out,
                layer=layer,
                rotation=rotation,
                q_norm=None if q_norm is None else q_norm.weight,
                k_norm=None if k_norm is None else k_norm.weight,
                eps=0.0 if q_norm is None else q_norm.eps,
                norm_form="llama" if q_norm is None else q_norm.form,
                scale=scale,
                window=window or 0,
                softcap=softcap or 0.0,
                sinks=scores,
            )

        return self._add((qkv,), heads * dim, emit, meets=True)

    def head_matrices(
        self, parameter: Tensor, heads: int, sizes: Sequence[int], transposed: Sequence[bool]
    ) -> list[list[PackedWeight]]:
        """The parameter [H (N1 + N2 ...), K] in pieces by head: for each of `sizes` (N1, N2, ...) a list of H weights.

        transposed: a piece [N, K] is packed as [K, N].
        """
        whole = cache(lambda: torch.cat([*self._parts(parameter)]).unflatten(0, (heads, -1)).split(tuple(sizes), 1))

        def piece(which: int, head: int) -> Sequence[Tensor]:
            found = whole()[which][head]
            return [found.T.contiguous() if transposed[which] else found]

        return [[self._pack(partial(piece, i, head)) for head in range(heads)] for i in range(len(sizes))]

    def by_head(self, x: Value, weights: list[PackedWeight], tail: int = 0) -> Value:
        """x: [T, H (K + tail)] -> [T, H (N + tail)]: a head's first K numbers times its weight, the others as they are.

        weights: of one head after the other.
        """

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.by_head(ids[0], out, weights, tail)

        return self._add((x,), len(weights) * (weights[0].n + tail), emit)

    def attend_latent(
        self,
        q: Value,
        latent: Value,
        *,
        layer: int,
        heads: int,
        value_dim: int,
        rotation: Tensor,
        interleaved: bool,
        norm: NormWeight,
        scale: float,
    ) -> Value:
        """q: [T, H D], latent: [T, D] -> [T, H value_dim]; the latent is stored in the pool.

        Before that the first value_dim numbers of the latent are normalised, and those behind them rotated, in q too.
        rotation: [positions, D - value_dim] float32. interleaved: neighbours are a pair.
        """

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.attend_latent(
                ids[0],
                ids[1],
                out,
                layer=layer,
                rotation=rotation,
                interleaved=interleaved,
                norm=norm.weight,
                eps=norm.eps,
                norm_form=norm.form,
                scale=scale,
            )

        return self._add((q, latent), heads * value_dim, emit, meets=True)

    def head(
        self, x: Value, parameter: Tensor, softcap: float | None, vocabulary: int, part: range | None = None
    ) -> None:
        """The program's end: its hidden states x, and the matrix [V, M] that makes logits of them.

        vocabulary: of all ranks; each has its share of it. part: the rows of the parameter that are this rank's, when
        it does not hold those alone.
        """
        ranks = self._ranks
        weight = self.matrix(parameter) if part is None else self._pack(lambda: self._rows(parameter, part))
        self._hidden = x
        if part is None:
            self._head_parameter, self._head_weight = parameter, weight

        def emit(program: Program, buffer: int) -> None:
            program.head(buffer, weight, softcap or 0.0)
            if ranks is not None:
                program.share_head(ranks, vocabulary)

        self._head = emit

    def end(self, x: Value) -> None:
        """The program's end where another one goes on: the hidden states x of all tokens."""
        self._hidden = x

    def _rows(self, parameter: Tensor, part: range) -> Sequence[Any]:
        (whole,) = self._parts.matrices(parameter)
        return [whole.rows(part) if isinstance(whole, QuantizedMatrix) else whole[part.start : part.stop]]

    def finish(self, *, heads: int, kv_heads: int, head_dim: int, value_dim: int = 0) -> Program:
        """The program. With a head it goes on with the kept tokens only after the last op in which tokens meet.

        value_dim: of latents, 0 where values lie beside the keys.
        """
        if self._hidden is None:
            raise ValueError("A program needs a head, or an end.")
        ops, hidden = keep_few(self._ops, self._hidden) if self._head else (self._ops, self._hidden)
        places = place(ops, hidden)
        program = Program(dtype=self.dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)
        for columns, kept in places.sizes:
            program.buffer(columns, kept)
        for op in ops:
            ids = [_NONE if value is None else places.of[value] for value in op.inputs]
            op.emit(program, ids, places.of[op.output])
        if self._head is not None:
            self._head(program, places.of[hidden])
        else:
            program.end(places.of[hidden])
        self._ops.clear()  # they refer to this builder: without them its memory, and the mapped checkpoint, go at once
        return program

    def _add(
        self,
        inputs: tuple[Value | None, ...],
        columns: int,
        emit: Emit,
        *,
        over: Value | None = None,
        meets: bool = False,
    ) -> Value:
        output = Value(columns)
        self._ops.append(Op(inputs, output, emit, over, meets))
        return output
