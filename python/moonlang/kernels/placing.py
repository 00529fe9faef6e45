"""The ops of a program, and the memory of their values: as little as they need at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sgl_kernel.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Rows of `columns` numbers in the program's dtype. kept: a row per kept token instead of one per token."""

    columns: int
    kept: bool = False


Emit = Callable[[Program, Sequence[int], int], None]  # (program, buffers of the inputs, buffer of the output)


@dataclass(frozen=True, slots=True)
class Op:
    """`over`: the input whose memory the output may take. meets: tokens meet in this op, so it needs all of them."""

    inputs: tuple[Value | None, ...]
    output: Value
    emit: Emit
    over: Value | None = None
    meets: bool = False


def _select(program: Program, ids: Sequence[int], out: int) -> None:
    program.select(ids[0], out)


def keep_few(ops: Sequence[Op], hidden: Value) -> tuple[list[Op], Value]:
    """The ops with a selection of the kept tokens right after the last op where tokens meet, and the new hidden."""
    last = max((i for i, op in enumerate(ops) if op.meets), default=-1)
    before, after = list(ops[: last + 1]), ops[last + 1 :]
    made = {op.output for op in before}
    renamed: dict[Value | None, Value | None] = {None: None}
    for value in [value for op in after for value in op.inputs] + [hidden]:
        if value in made and value not in renamed:
            kept = Value(value.columns, True)
            before.append(Op((value,), kept, _select))
            renamed[value] = kept
    for op in after:
        renamed[op.output] = kept = Value(op.output.columns, True)
        inputs = tuple(renamed[value] for value in op.inputs)
        before.append(Op(inputs, kept, op.emit, renamed[op.over]))
    found = renamed[hidden]
    assert found is not None
    return before, found


@dataclass(frozen=True, slots=True)
class Places:
    """of: the buffer of each value. sizes: by buffer, its (columns, kept)."""

    of: dict[Value, int]
    sizes: list[tuple[int, bool]]


def place(ops: Sequence[Op], hidden: Value) -> Places:
    """A buffer for each value: memory is taken again as soon as nobody reads it any more. `hidden` stays to the end."""
    last_use = {value: i for i, op in enumerate(ops) for value in op.inputs if value is not None}
    last_use[hidden] = len(ops)
    places = Places({}, [])
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
