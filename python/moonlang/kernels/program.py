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

from moonlang.kernels.packing import pack

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


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Rows of `columns` numbers in the program's dtype. kept: a row per kept token instead of one per token."""

    columns: int
    kept: bool = False


Emit = Callable[[Program, Sequence[int], int], None]  # (program, buffers of the inputs, buffer of the output)


@dataclass(frozen=True, slots=True)
class _Op:
    """`over`: the input whose memory the output may take. meets: tokens meet in this op, so it needs all of them."""

    inputs: tuple[Value | None, ...]
    output: Value
    emit: Emit
    over: Value | None = None
    meets: bool = False


@dataclass(frozen=True, slots=True)
class NormWeight:
    """An RMS norm. form "llama": rounded, then times weight [n], both in the dtype; "gemma": all in float32."""

    weight: Tensor
    eps: float
    form: str


class Parts(Protocol):
    """The tensors that make up a parameter, one below the other, as they lie in the checkpoint: model_loader.parts."""

    def __call__(self, parameter: Tensor) -> Sequence[Tensor]: ...

    def matrices(self, parameter: Tensor) -> Sequence[Any]:
        """Of a matrix that is multiplied by: tensors, or quantised matrices."""
        ...


class Builder:
    """Collects kernel calls.

    dtype: of the values, "float32", "bfloat16" or "float16". packed: where weights packed before may lie. ranks: those
    who hold the other shards of the model.
    """

    def __init__(
        self, dtype: str, parts: Parts, packed: PackedWeights | None = None, ranks: Ranks | None = None
    ) -> None:
        self.dtype = dtype
        self._torch_dtype: torch.dtype = getattr(torch, dtype)
        self._parts = parts
        self._packed = packed or Unkept()
        self._ranks = ranks
        self._weight_bytes = 0
        self._ops: list[_Op] = []
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
        if self.dtype not in _KINDS:
            self.refuse(f"the kernels keep no weights in {self.dtype}")
        wanted = kind or _KINDS[self.dtype]
        weight = self._packed.weight(
            lambda arena: pack(parts(), kind=wanted, gated=gated, arena=arena, segments=segments)
        )
        self._weight_bytes += weight.bytes
        return weight

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
        gate_up: Tensor,
        down: Tensor,
        act: str,
        gating: Mapping[str, Any],
        shared: tuple[Tensor, Tensor] | None = None,
        shared_gate: Tensor | None = None,
        residual: Value | None = None,
    ) -> Value:
        """A mixture of experts (+ residual). router: [E, M], kept in float32. gate_up: [E, 2F, M], down: [E, M, F].

        The parameters are this rank's experts, whose E may be less than the router's. gating: arguments of
        `sgl_kernel.moe.gating`. shared: gate_up and down of an expert that every token visits,
        weighted by the sigmoid of `shared_gate` [1, M].
        """
        layer = moe.moe(
            router=self.matrix(router, kind="f32"),
            gate_up=self._expert_matrices(gate_up, gated=True),
            down=self._expert_matrices(down),
            gating=moe.gating(**gating),
            act=self._kernel_act(act),
            shared=() if shared is None else (self.matrix(shared[0], gated=True), self.matrix(shared[1])),
            shared_gate=None if shared_gate is None else self.matrix(shared_gate, kind="f32"),
            ranks=self._ranks,
        )

        def emit(program: Program, ids: Sequence[int], out: int) -> None:
            program.experts(ids[0], out, layer, ids[1])

        return self._add((x, residual), x.columns, emit, over=residual)

    def _expert_matrices(self, parameter: Tensor, *, gated: bool = False) -> list[PackedWeight]:
        """The parameter [E, N, K], packed expert by expert."""
        parts = cache(lambda: self._parts.matrices(parameter))

        def of(expert: int) -> Sequence[Any]:
            whole = parts()[0]
            if isinstance(whole, Tensor) and whole.ndim == 3:
                return [whole[expert]]
            each = len(parts()) // len(parameter)
            return parts()[expert * each : (expert + 1) * each]

        return [self._pack(partial(of, expert), gated=gated) for expert in range(len(parameter))]

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
    ) -> Value:
        """qkv: [T, (H + 2K) D], rotated and stored in the pool, then attended: [T, H D].

        heads: H. rotation: [positions, D] float32, the cosines of the first half of a head, then its sines. q_norm,
        k_norm: of each head of q and k, before the rotation.
        """
        dim = rotation.shape[1]

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
            )

        return self._add((qkv,), heads * dim, emit, meets=True)

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

    def _rows(self, parameter: Tensor, part: range) -> Sequence[Any]:
        (whole,) = self._parts.matrices(parameter)
        return [whole[part.start : part.stop]]

    def finish(self, *, heads: int, kv_heads: int, head_dim: int) -> Program:
        """The program. After the last op in which tokens meet it goes on with the kept tokens only."""
        if self._head is None or self._hidden is None:
            raise ValueError("A program needs a head.")
        ops, hidden = _keep_few(self._ops, self._hidden)
        places = _places(ops, hidden)
        program = Program(dtype=self.dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for columns, kept in places.sizes:
            program.buffer(columns, kept)
        for op in ops:
            ids = [_NONE if value is None else places.of[value] for value in op.inputs]
            op.emit(program, ids, places.of[op.output])
        self._head(program, places.of[hidden])
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
        self._ops.append(_Op(inputs, output, emit, over, meets))
        return output


def _select(program: Program, ids: Sequence[int], out: int) -> None:
    program.select(ids[0], out)


def _keep_few(ops: Sequence[_Op], hidden: Value) -> tuple[list[_Op], Value]:
    """The ops with a selection of the kept tokens right after the last op where tokens meet, and the new hidden."""
    last = max((i for i, op in enumerate(ops) if op.meets), default=-1)
    before, after = list(ops[: last + 1]), ops[last + 1 :]
    made = {op.output for op in before}
    renamed: dict[Value | None, Value | None] = {None: None}
    for value in [value for op in after for value in op.inputs] + [hidden]:
        if value in made and value not in renamed:
            kept = Value(value.columns, True)
            before.append(_Op((value,), kept, _select))
            renamed[value] = kept
    for op in after:
        renamed[op.output] = kept = Value(op.output.columns, True)
        inputs = tuple(renamed[value] for value in op.inputs)
        before.append(_Op(inputs, kept, op.emit, renamed[op.over]))
    found = renamed[hidden]
    assert found is not None
    return before, found


@dataclass(frozen=True, slots=True)
class _Places:
    """of: the buffer of each value. sizes: by buffer, its (columns, kept)."""

    of: dict[Value, int]
    sizes: list[tuple[int, bool]]


def _places(ops: Sequence[_Op], hidden: Value) -> _Places:
    """A buffer for each value: memory is taken again as soon as nobody reads it any more. `hidden` stays to the end."""
    last_use = {value: i for i, op in enumerate(ops) for value in op.inputs if value is not None}
    last_use[hidden] = len(ops)
    places = _Places({}, [])
    free: list[int] = []
    for i, op in enumerate(ops):
        ended = {value for value in op.inputs if value is not None and last_use[value] == i}
        if op.over in ended and op.over is not None:
            places.of[op.output] = places.of[op.over]
            ended.remove(op.over)
        else:
            places.of[op.output] = _take(free, places.sizes, op.output)
        free += [places.of[value] for value in dict.fromkeys(op.inputs) if value in ended and value is not None]
    return places


def _take(free: list[int], sizes: list[tuple[int, bool]], value: Value) -> int:
    """A free buffer of the value's kind, the nearest in size, grown if need be; or a new one."""
    fitting = [buffer for buffer in free if sizes[buffer][1] == value.kept]
    if not fitting:
        sizes.append((value.columns, value.kept))
        return len(sizes) - 1
    best = min(fitting, key=lambda buffer: (abs(sizes[buffer][0] - value.columns), buffer))
    free.remove(best)
    sizes[best] = (max(sizes[best][0], value.columns), value.kept)
    return best
