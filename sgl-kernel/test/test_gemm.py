"""The product of packed weights: right, and the same bits for a row wherever it stands."""

import itertools

import pytest
import sgl_kernel as kernels
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "none": lambda v: v,
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    "gelu_erf": torch.nn.functional.gelu,
    "relu": torch.relu,
}


def product(w, x, columns: int, dtype=torch.float32, **epilogue) -> torch.Tensor:
    """gemm into a poisoned, strided output whose neighbours must stay poisoned."""
    wide = torch.full((x.shape[0] + 2, columns + 5), float("nan"), dtype=dtype)
    y = wide[1:-1, 2:-3]
    kernels.gemm(w, x, y, **epilogue)
    assert torch.isnan(wide[0]).all()
    assert torch.isnan(wide[-1]).all()
    assert torch.isnan(wide[:, :2]).all()
    assert torch.isnan(wide[:, -3:]).all()
    return y


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 2e-3}


@pytest.mark.parametrize(("kind", "weight_dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 17), (64, 64), (100, 130), (257, 65)])
def test_equals_the_reference(kind, weight_dtype, n, k):
    weight = torch.randn(n, k).to(weight_dtype)
    packed = kernels.pack(weight, kind=kind)
    assert (packed.kind, packed.n, packed.k, packed.columns) == (kind, n, k, n)
    for m, x_dtype, y_dtype in itertools.product([1, 2, 5, 13, 29], DTYPES, DTYPES):
        x = torch.randn(m, k + 7).to(x_dtype)[:, 3:-4]
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(product(packed, x, n, y_dtype).double(), expected, **tolerance(y_dtype))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("columns", [16, 23, 70])
def test_epilogue(act, gated, columns):
    k, m = 48, 6
    n = 2 * columns if gated else columns
    weight, bias = torch.randn(n, k) / 4, torch.randn(n)
    packed = kernels.pack([weight[: n // 2], weight[n // 2 :]], kind="f32", gated=gated)
    x, residual = torch.randn(m, k), torch.randn(m, columns)
    sums = x @ weight.T + bias
    value = ACTIVATIONS[act](sums[:, :columns]) * sums[:, columns:] if gated else ACTIVATIONS[act](sums)
    y = product(packed, x, columns, bias=bias, residual=residual, act=act)
    torch.testing.assert_close(y, value + residual, rtol=1e-4, atol=1e-4)
    kernels.gemm(packed, x, residual, bias=bias, residual=residual, act=act)
    assert torch.equal(residual, y)


def test_a_weight_with_a_bias_and_bounds_of_its_own():
    weight, bias, x = torch.randn(2 * 21, 40), torch.randn(2 * 21), torch.randn(5, 40) * 3
    packed = kernels.pack([weight[:21], weight[21:]], kind="f32", gated=True).with_bias(bias).with_bounds(1.5, 2.0)
    gate, up = (x.double() @ weight.T.double() + bias).chunk(2, 1)
    assert (gate > 2).any()
    assert (up.abs() > 2).any()
    gate, up = gate.clamp(max=2), up.clamp(-2, 2)
    expected = (up + 1) * gate * torch.sigmoid(1.5 * gate)
    torch.testing.assert_close(product(packed, x, 21, act="bounded").double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="bias"):
        packed.with_bias(bias[:21])


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_the_bits_of_a_row_do_not_depend_on_the_others(kind):
    n, k, m = 300, 1026, 130
    packed = kernels.pack(torch.randn(n, k), kind=kind)
    for x_dtype in DTYPES:
        x = torch.randn(m, k).to(x_dtype)
        kernels.set_threads(1)
        whole = product(packed, x, n)
        for threads, chunk in [(1, 1), (2, 1), (2, 7), (1, 12), (2, 16), (2, 64), (3, 130)]:
            kernels.set_threads(threads)
            parts = [product(packed, x[i : i + chunk], n) for i in range(0, m, chunk)]
            assert torch.equal(torch.cat(parts), whole), (x_dtype, threads, chunk)


def test_packing_rounds_to_nearest_even():
    weight = torch.randn(40, 31)
    packed, expected = kernels.pack(weight, kind="bf16"), kernels.pack(weight.bfloat16(), kind="bf16")
    assert bytes(packed.memory()) == bytes(expected.memory())


def test_weights_share_an_arena_and_outlive_it():
    arena = kernels.arena(1 << 20)
    weight = torch.randn(64, 64)
    packed = [kernels.pack(weight, kind="f32", arena=arena) for _ in range(100)]
    assert arena.taken_bytes == 100 * 64 * 64 * 4
    del arena
    x = torch.randn(1, 64)
    for w in packed:
        torch.testing.assert_close(product(w, x, 64), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_refusals():
    packed = kernels.pack(torch.ones(8, 4))
    with pytest.raises(ValueError, match="x: expected 4 columns"):
        kernels.gemm(packed, torch.ones(1, 5), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"y: expected \[1, 8\]"):
        kernels.gemm(packed, torch.ones(1, 4), torch.ones(2, 8))
    with pytest.raises(ValueError, match="act: expected"):
        kernels.gemm(packed, torch.ones(1, 4), torch.ones(1, 8), act="swish")
    with pytest.raises(ValueError, match="bias"):
        kernels.gemm(packed, torch.ones(1, 4), torch.ones(1, 8), bias=torch.ones(7))
    with pytest.raises(ValueError, match="residual"):
        kernels.gemm(packed, torch.ones(1, 4), torch.ones(1, 8), residual=torch.ones(1, 8).bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        kernels.gemm(packed, torch.ones(4, 4).T, torch.ones(4, 8))
    with pytest.raises(ValueError, match="same K"):
        kernels.pack([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(ValueError, match="even number"):
        kernels.pack(torch.ones(3, 4), gated=True)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 48), (70, 256)])
def test_segments_share_a_sum(kind, dtype, n, k):
    """2, 4 or 8 parts of K, added as a tree, have the bits of one weight that adds eight segments itself."""
    weight = torch.randn(n, k).to(dtype)
    whole = kernels.pack(weight, kind=kind, segments=8)
    assert whole.segments == 8
    for m, x_dtype in itertools.product([1, 5, 13, 29, 97], DTYPES):
        x = torch.randn(m, k).to(x_dtype)
        expected = product(whole, x, n)
        torch.testing.assert_close(expected.double(), x.double() @ weight.double().T, rtol=2e-3, atol=2e-3)
        for ranks in (2, 4, 8):
            sums = []
            for part in range(ranks):
                columns = slice(part * k // ranks, (part + 1) * k // ranks)
                share = kernels.pack(weight[:, columns], kind=kind, segments=8 // ranks)
                sums.append(product(share, x[:, columns], n))
            while len(sums) > 1:
                sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
            assert torch.equal(sums[0], expected)


@pytest.mark.parametrize(("segments", "k"), [(3, 48), (16, 64), (8, 24), (0, 16)])
def test_impossible_segments(segments, k):
    with pytest.raises(ValueError, match="segments"):
        kernels.pack(torch.randn(4, k), kind="f32", segments=segments)
