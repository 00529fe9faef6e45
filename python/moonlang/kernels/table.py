"""The one table of operations: for each its implementations, best first, and the facts that let one be used.

torch   the reference, on every device
cpu     `sgl_kernel`, MoonLang's own kernels for AVX-512, AVX2 and other CPUs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TORCH, CPU = "torch", "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What decides. isa: the instruction set of the installed CPU kernels, "" when there are none.

    own_model: the model is one of `moonlang.models` that can be written down as kernel calls, not one of transformers.
    """

    device: str
    dtype: str
    isa: str
    attention_backend: str
    own_model: bool = True


@dataclass(frozen=True, slots=True)
class Implementation:
    """obstacle(facts): why it cannot be used, "" when it can."""

    name: str
    obstacle: Callable[[Facts], str]


@dataclass(frozen=True, slots=True)
class Choice:
    """implementation of an operation, and why it is not a better one (or that it is the best)."""

    operation: str
    implementation: str
    reason: str


def _never(facts: Facts) -> str:
    return ""


def _no_kernels(facts: Facts) -> str:
    if facts.device != "cpu":
        return f"the device is {facts.device}"
    return "" if facts.isa else "sgl-kernel is not installed"


def _no_attention(facts: Facts) -> str:
    if facts.attention_backend != "cpu":
        return f"--attention-backend {facts.attention_backend}"
    return _no_kernels(facts)


def _no_program(facts: Facts) -> str:
    if not facts.own_model:
        return "transformers runs the model"
    if facts.dtype not in ("float32", "bfloat16"):
        return f"no weights are kept in {facts.dtype}"
    return _no_attention(facts)


_REFERENCE = Implementation(TORCH, _never)
_IN_PROGRAM = (Implementation(CPU, _no_program), _REFERENCE)

OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    "forward": _IN_PROGRAM,  # the whole step: one call of a program, or modules of torch one by one
    "embedding": _IN_PROGRAM,
    "norm": _IN_PROGRAM,
    "linear": _IN_PROGRAM,
    "rotary": _IN_PROGRAM,
    "attention": (Implementation(CPU, _no_attention), _REFERENCE),
    "experts": _IN_PROGRAM,
    "logits": _IN_PROGRAM,
    "sampling": (Implementation(CPU, _no_kernels), _REFERENCE),
}


def choose(operation: str, facts: Facts) -> Choice:
    """The first implementation of the operation that the facts allow."""
    obstacles: list[str] = []
    for implementation in OPERATIONS[operation]:
        obstacle = implementation.obstacle(facts)
        if not obstacle:
            return Choice(operation, implementation.name, "; ".join(obstacles) or _praise(implementation.name, facts))
        obstacles.append(f"not {implementation.name}: {obstacle}")
    raise LookupError(f"No implementation of {operation}: {'; '.join(obstacles)}")


def choices(facts: Facts) -> list[Choice]:
    """Every operation's."""
    return [choose(operation, facts) for operation in OPERATIONS]


def _praise(name: str, facts: Facts) -> str:
    return f"kernels for {facts.isa}" if name == CPU else "the only one"
