"""Mixtures of experts against float64, one token at a time; and the same bits in every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sgl_kernel
import torch
import torch.nn.functional as F
from sgl_kernel import moe
from torch import Tensor

GATINGS = [
    {"experts_per_token": 3},
    {"experts_per_token": 2, "normalise": True},
    {"experts_per_token": 4, "sigmoid": True, "normalise": True, "scale": 2.5, "groups": 3, "groups_kept": 2},
    {"experts_per_token": 1, "groups": 4, "groups_kept": 1},
]
EXPERTS = 12


def chosen_by_hand(logits: Tensor, gating: dict[str, float], bias: Tensor | None) -> tuple[list[float], list[int]]:
    """One row, in float64."""
    row = logits.double()
    scores = (row.sigmoid() if gating.get("sigmoid") else row.softmax(-1)).tolist()
    choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
    groups = int(gating.get("groups", 1))
    members = len(choice) // groups
    counted = 1 if bias is None else 2
    good = [sum(sorted(choice[g * members : (g + 1) * members])[-counted:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-good[g], g))[: int(gating.get("groups_kept", 1))]
    ranked = sorted((i for i in range(len(choice)) if i // members in kept), key=lambda i: (-choice[i], i))
    experts = ranked[: int(gating["experts_per_token"])]
    total = sum(scores[i] for i in experts) if gating.get("normalise") else 1.0
    return [scores[i] / total * gating.get("scale", 1.0) for i in experts], experts


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_gating(gating: dict[str, float], biased: bool, rows: int) -> None:
    logits, bias = torch.randn(rows, EXPERTS) * 2, torch.randn(EXPERTS) * 0.1 if biased else None
    per_token = int(gating["experts_per_token"])
    weights, experts = torch.full((rows, per_token), math.nan), torch.full((rows, per_token), -1, dtype=torch.int32)
    moe.top_experts(logits, moe.gating(**gating), weights, experts, bias)
    for row in range(rows):
        expected, chosen = chosen_by_hand(logits[row], gating, bias)
        assert experts[row].tolist() == chosen
        assert weights[row].tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("experts", [1, 5, 16, 128, 1024])
def test_equal_scores_go_to_the_lower_ids(experts: int) -> None:
    per_token = min(8, experts)
    weights, chosen = torch.empty(3, per_token), torch.empty(3, per_token, dtype=torch.int32)
    moe.top_experts(torch.zeros(3, experts), moe.gating(per_token), weights, chosen)
    assert chosen.tolist() == [list(range(per_token))] * 3
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / experts))


@dataclass
class Layer:
    """Random weights [E, 2F, M], [E, M, F], [E, M] in `dtype`, and the packed layer."""

    size: int
    inner: int
    dtype: torch.dtype
    gating: dict[str, float]
    shared: bool = False

    def __post_init__(self) -> None:
        def random(*shape: int) -> Tensor:
            return (torch.randn(shape) / shape[-1] ** 0.5).to(self.dtype)

        self.gate_up, self.down = random(EXPERTS, 2 * self.inner, self.size), random(EXPERTS, self.size, self.inner)
        self.router = random(EXPERTS, self.size) * 3
        self.always = (random(2 * self.inner, self.size), random(self.size, self.inner)) if self.shared else ()
        self.always_gate = random(1, self.size) if self.shared else None

        self.packed = self.pack(range(EXPERTS))

    def _pack(self, weight: Tensor, gated: bool = False) -> object:
        return sgl_kernel.pack(weight, kind="f32" if self.dtype == torch.float32 else "bf16", gated=gated)

    def experts(self, experts: Sequence[int]) -> tuple[list[object], list[object]]:
        """gate_up and down of some of them."""
        return [self._pack(self.gate_up[e], True) for e in experts], [self._pack(self.down[e]) for e in experts]

    def pack(self, experts: Sequence[int], **ranks: Any) -> Any:
        """The layer with some of the experts. ranks: arguments of `moe.moe`."""
        gate_up, down = self.experts(experts)
        pack = self._pack
        return moe.moe(
            router=pack(self.router),
            gate_up=gate_up,
            down=down,
            gating=moe.gating(**self.gating),
            shared=[pack(self.always[0], True), pack(self.always[1])] if self.shared else (),
            shared_gate=pack(self.always_gate) if self.always_gate is not None else None,
            **ranks,
        )

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.full(x.shape, math.nan, dtype=x.dtype)
        moe.run_moe(self.packed, x, y, residual)
        return y

    def expected(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """In float64, h and z rounded to the dtype as they are in memory."""

        def expert(row: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = (gate_up.double() @ row).chunk(2)
            h = (F.silu(gate) * up).to(self.dtype).double()
            return (down.double() @ h).to(self.dtype).double()

        rows = []
        for i, row in enumerate(x.double()):
            weights, chosen = chosen_by_hand((self.router.double() @ row), self.gating, None)
            total = torch.zeros(self.size, dtype=torch.float64)
            for weight, e in zip(weights, chosen, strict=True):
                total += weight * expert(row, self.gate_up[e], self.down[e])
            if self.always_gate is not None:
                total += torch.sigmoid(self.always_gate.double() @ row) * expert(row, *self.always)
            rows.append(total if residual is None else total + residual[i].double())
        return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "inner"), [(48, 16), (70, 33), (256, 160)])
@pytest.mark.parametrize("rows", [1, 2, 9, 130])
@pytest.mark.parametrize("shared", [False, True])
def test_layer(dtype: torch.dtype, size: int, inner: int, rows: int, shared: bool) -> None:
    layer = Layer(size, inner, dtype, GATINGS[1], shared)
    x = torch.randn(rows, size).to(dtype)
    residual = torch.randn(rows, size).to(dtype) if shared else None
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    got = layer.run(x, residual)
    torch.testing.assert_close(got.double(), layer.expected(x, residual), rtol=tolerance, atol=tolerance)
    if residual is not None:
        moe.run_moe(layer.packed, x, residual, residual)
        assert torch.equal(residual, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gating", GATINGS)
def test_a_token_is_alone(dtype: torch.dtype, gating: dict[str, float]) -> None:
    """Alone, in 32 rows, in chunks of 16, 64 and 512, on one thread and on two."""
    layer, x = Layer(160, 96, dtype, gating, shared=True), torch.randn(512, 160).to(dtype)
    whole = layer.run(x)
    for chunk in (16, 64):
        assert torch.equal(torch.cat([layer.run(part) for part in x.split(chunk)]), whole)
    for i in (0, 31, 255, 511):
        assert torch.equal(layer.run(x[i : i + 1]), whole[i : i + 1])
    assert torch.equal(layer.run(x[torch.arange(511, -1, -1)]).flip(0), whole)
    threads = sgl_kernel.threads()
    for count in (1, 2):
        sgl_kernel.set_threads(count)
        assert torch.equal(layer.run(x), whole)
    sgl_kernel.set_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_quantised_experts_each_with_its_own_order_of_columns(kind: str) -> None:
    """The same bits as one product per token and expert."""
    size, inner, dtype = 128, 64, torch.bfloat16

    def quantised(rows: int, columns: int, parts: int) -> object:
        codes = [torch.randint(-127, 128, (rows, columns), dtype=torch.int8) for _ in range(parts)]
        scales = [torch.rand(rows, 1) / columns / 20 for _ in range(parts)]
        order = torch.randperm(columns, dtype=torch.int32) if kind == "int8" else None
        return sgl_kernel.pack_quantized(codes, scales, kind=kind, group=columns, order=order, gated=parts == 2)

    gate_up, down = [quantised(inner, size, 2) for _ in range(4)], [quantised(size, inner, 1) for _ in range(4)]
    router = sgl_kernel.pack(torch.randn(4, size), kind="f32")
    layer = moe.moe(router=router, gate_up=gate_up, down=down, gating=moe.gating(1))
    x, y = torch.randn(40, size).to(dtype), torch.empty(40, size, dtype=dtype)
    moe.run_moe(layer, x, y)
    logits, weights, chosen = torch.empty(40, 4), torch.empty(40, 1), torch.empty(40, 1, dtype=torch.int32)
    sgl_kernel.gemm(router, x, logits)
    moe.top_experts(logits, moe.gating(1), weights, chosen)
    assert len(chosen.unique()) > 1
    for row, expert in enumerate(chosen.flatten().tolist()):
        h, z = torch.empty(1, inner, dtype=dtype), torch.empty(1, size, dtype=dtype)
        sgl_kernel.gemm(gate_up[expert], x[row : row + 1], h, act="silu")
        sgl_kernel.gemm(down[expert], h, z)
        assert torch.equal(y[row], (z[0].float() * weights[row]).to(dtype))


def test_more_tokens_than_fit_in_the_scratch_memory() -> None:
    layer, x = Layer(32, 16, torch.bfloat16, GATINGS[0]), torch.randn(7000, 32).bfloat16()
    got = layer.run(x)
    assert torch.equal(got[-50:], layer.run(x[-50:]))


def test_what_does_not_fit_is_refused() -> None:
    layer = Layer(32, 16, torch.float32, GATINGS[0])
    with pytest.raises(ValueError, match="expected 32 columns"):
        layer.run(torch.zeros(2, 31))
    with pytest.raises(ValueError, match="must not be x"):
        moe.run_moe(layer.packed, x := torch.zeros(2, 32), x)
    for change in ({"experts_per_token": 13}, {"groups": 5}, {"groups": 4, "groups_kept": 5}):
        with pytest.raises(ValueError, match=r"mixture of experts|groups|experts"):
            Layer(32, 16, torch.float32, {"experts_per_token": 2} | change)
