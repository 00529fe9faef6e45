"""Mixtures of experts: gating, and the experts' products over the tokens that chose them."""

from collections.abc import Sequence
from typing import Any

from sgl_kernel import _C


def gating(
    experts_per_token: int,
    *,
    normalise: bool = False,
    sigmoid: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    groups_kept: int = 1,
) -> Any:
    """How a router's scores become weights.

    Scores are a softmax over the experts, or sigmoids. normalise: the chosen weights are divided by their sum.
    scale: they are multiplied by it at the end. With several groups of experts only the `groups_kept` best are chosen
    from; a group is as good as its best expert, or as the sum of its best two when the router has a bias.
    """
    return _C.Gating(experts_per_token, normalise, sigmoid, scale, groups, groups_kept)


def top_experts(logits: Any, gating: Any, weights: Any, experts: Any, bias: Any = None) -> None:
    """Choose experts, best first, equal ones by id.

    logits: [T, E] float32 -> weights: [T, X] float32, experts: [T, X] int32. bias: [E] float32 or None is added to the
    scores for the choice, not for the weights.
    """
    _C.top_experts(logits, gating, bias, weights, experts)


def moe(
    *,
    router: Any,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    gating: Any,
    act: str = "silu",
    router_bias: Sequence[float] = (),
    shared: Sequence[Any] = (),
    shared_gate: Any = None,
    ranks: Any = None,
    lanes: Sequence[Any] = (),
    placement: Any = None,
    own_tokens: bool = False,
    peers: Any = None,
) -> Any:
    """One layer of experts, for `run_moe`. All weights are PackedWeights; ValueError when they do not go together.

    router: [E, M]. gate_up: gated weights [2F, M] of the experts here. down: theirs [M, F]. shared: the gate_up and the
    down of an expert that every token visits, weighted by the sigmoid of `shared_gate` [1, M] when there is one.
    act: silu, gelu_tanh, gelu_erf, relu, or bounded with the bounds of the weights (`PackedWeight.with_bounds`).
    ranks: each holds only experts [E * rank // size, E * (rank + 1) // size), and all run the layer together, with the
    same x. lanes: exchanges (see `sgl_kernel.exchange`) over which each rank has its share of the tokens computed where
    the experts are, which `placement` says. With two, one half of the tokens travels while the other is computed.
    own_tokens: every rank runs the layer equally often, but with an x of its own, of any number of rows. peers: Ranks
    that have the same x nevertheless, equally many for every rank.

    The layer goes on with other experts after `hold(placement, gate_up, down)`, which all ranks call between the same
    two runs; `take_counts()` says how often each expert was chosen since the last time, by the tokens that this rank
    sees to.
    """
    gates = [] if shared_gate is None else [shared_gate]
    weights = (router, list(router_bias), list(gate_up), list(down), list(shared), gates)
    return _C.moe(*weights, gating, act, ranks, list(lanes), placement, own_tokens, peers)


def run_moe(moe: Any, x: Any, y: Any, residual: Any = None) -> None:
    """`y` [T, M] = moe(x) (+ residual) for `x` [T, M], all of one type: float32, bfloat16 or float16.

    `y` may be the residual.
    A token's experts are summed in float32 in the order of its list, so its result depends on that token alone.
    """
    _C.run_moe(moe, x, y, residual)
