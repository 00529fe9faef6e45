"""Quantised weights: against sums in float64, and the same bits for every number of rows and threads."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import pytest
import sgl_kernel
import torch
from torch import Tensor

_ALL = ("generic", "avx2", "avx512")
ISAS = _ALL[: _ALL.index(sgl_kernel.detected_isa()) + 1]
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
KINDS = ("int8", "int4", "w8a8", *FP8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 5), (33, 130), (80, 4), (70, 523))


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> str:
    """Every test runs on every instruction set of this machine."""
    sgl_kernel.force_isa(request.param)
    sgl_kernel.set_threads(1)  # the matrices are small
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    return request.param


@dataclass
class Case:
    """A matrix in codes, as `pack_quantized` takes it, and what it stands for in float64."""

    kind: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    order: Tensor | None

    def pack(self, **options: object) -> object:
        zeros = None if self.zeros is None else [self.zeros]
        return sgl_kernel.pack_quantized(
            [self.codes], [self.scales], zeros, kind=self.kind, group=self.group, order=self.order, **options
        )

    def matrix(self) -> Tensor:
        groups = torch.arange(self.codes.shape[1]) // self.group
        values = self.codes.double()
        if self.zeros is not None:
            values = values - self.zeros.double()[:, groups]
        values = values * self.scales.double()[:, groups]
        return values if self.order is None else torch.zeros_like(values).index_copy_(1, self.order.long(), values)


def make(kind: str, n: int, k: int, *, group: int | None = None, zeros: bool = False, order: bool = False) -> Case:
    """group: None for one per row."""
    group = group or k
    groups = -(-k // group)
    if kind in FP8:
        bits = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        largest = 0x7E if kind == "fp8_e4m3" else 0x7B  # the codes above are NaN or infinite
        codes = (bits & 0x80 | (bits & 0x7F).clamp(max=largest)).view(FP8[kind])
    else:
        low, high = {"int4": (-8, 7), "int8": (-128, 127), "w8a8": (-127, 127)}[kind]
        codes = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
    scales = torch.rand(n, groups) * (1e-3 if kind in FP8 else 0.02) + 1e-4
    zero_points = torch.randint(-8, 8, (n, groups)).float() if zeros else None
    return Case(kind, codes, scales, zero_points, group, torch.randperm(k).int() if order else None)


def product(w: object, x: Tensor, columns: int, dtype: torch.dtype = torch.float32, **epilogue: object) -> Tensor:
    """The output lies in the middle of poison, which must survive."""
    frame = torch.full((len(x) + 2, columns + 2), 777.0, dtype=dtype)
    out = frame[1:-1, 1:-1]
    out.fill_(float("nan"))
    sgl_kernel.gemm(w, x, out, **epilogue)
    result = out.clone()
    out.fill_(777.0)
    assert (frame == 777.0).all(), "written outside of the output"
    return result


def quantized_rows(x: Tensor) -> Tensor:
    """What w8a8 makes of x, in float64."""
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, torch.zeros_like(largest))
    codes = (x * inverse).round()
    return codes.double() * (largest / 127.0).double()


def expect(case: Case, x: Tensor, got: Tensor, segments: int = 1) -> None:
    """Within the rounding of a sum of float32 products, or of 16-bit rows for the kinds that use them."""
    rows = x.double()
    if case.kind == "w8a8":
        rows = torch.cat([quantized_rows(part) for part in x.chunk(segments, 1)], 1)
    error = (got.double() - rows @ case.matrix().T).abs()
    # With zero points two large sums are subtracted.
    codes = case.codes.double().abs() + (8 if case.zeros is not None else 0)
    codes = codes * case.scales.double()[:, torch.arange(codes.shape[1]) // case.group]
    order = case.order.long() if case.order is not None else slice(None)
    bound = 1e-5 * (rows.abs()[:, order] @ codes.T) + 1e-6
    if case.kind in ("int8", "int4") and x.dtype != torch.float32:
        bound += 2**-15 * rows.abs().amax(1, keepdim=True) * codes.sum(1)
    assert (error <= bound).all(), float(error.max())


def rows_of(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows with a stride of their own."""
    return torch.randn(m, k + 3).to(dtype)[:, :k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_per_row(kind: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        case = make(kind, n, k)
        w = case.pack()
        assert (w.n, w.k, w.columns) == (n, k, n)
        for m in (1, 2, 5, 14):
            x = rows_of(m, k, dtype)
            expect(case, x, product(w, x, n))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("group", [4, 32, 128, 256])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8_e4m3", "fp8_e5m2"])
def test_groups(kind: str, group: int, dtype: torch.dtype) -> None:
    for zeros, order in ((False, False), (True, True)):
        for k in (group, 2 * group + 4, 5 * group + 3):
            case = make(kind, 21, k, group=group, zeros=zeros, order=order)
            w = case.pack()
            for m in (1, 9):
                x = rows_of(m, k, dtype)
                expect(case, x, product(w, x, 21))


def test_every_code_has_its_value() -> None:
    for kind in KINDS:
        all_codes = make(kind, 1, 1024).codes.view(torch.int8).unique()
        k = len(all_codes)
        codes = all_codes.view(FP8.get(kind, torch.int8)).expand(3, k)
        case = Case(kind, codes.contiguous(), torch.ones(3, 1), None, k, None)
        got = product(case.pack(), torch.eye(k, dtype=torch.bfloat16), 3)
        assert torch.equal(got.T, codes.float()), kind


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bf16_rows_lose_nothing_that_counts(kind: str) -> None:
    """Elements within a factor of 128 are exact, so the result is that of exact sums, rounded once per segment."""
    case = make(kind, 40, 512)
    x = (torch.rand(6, 512) * 120 + 1.5).bfloat16() * torch.randint(0, 2, (6, 512)).mul(2).sub(1)
    x[:, ::128] = 127
    wanted = x.double() @ case.matrix().T
    got = product(case.pack(), x, 40)
    largest = (x.double().abs() @ case.matrix().abs().T).max()
    assert (got.double() - wanted).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8_e4m3"])
def test_nan_and_infinity_are_not_hidden(kind: str) -> None:
    w = make(kind, 8, 300).pack()
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 300).bfloat16()
        x[1, 200] = bad
        y = product(w, x, 8)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


def test_tiny_and_huge_rows() -> None:
    case = make("int8", 8, 256)
    for size in (2.0**-80, 2.0**80):
        x = torch.randn(2, 256).bfloat16() * size
        expect(case, x / size, product(case.pack(), x, 8) / size)
    assert not product(case.pack(), torch.full((1, 256), 1e-38).bfloat16(), 8).abs().max() > 1e-33


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    grouped = kind in ("int4", "fp8_e4m3")
    case = make(kind, 200, 1152, group=128 if grouped else None, zeros=kind == "int4")
    w = case.pack()
    for dtype in (torch.bfloat16, torch.float32):
        x = rows_of(250, 1152, dtype)
        whole = product(w, x, 200)
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 32, 64, 97):
            begin = m % 5
            assert torch.equal(product(w, x[begin : begin + m], 200), whole[begin : begin + m]), m
        sgl_kernel.set_threads(2)
        assert torch.equal(product(w, x, 200), whole)
        assert torch.equal(product(w, x[4:5], 200), whole[4:5])


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_epilogues(kind: str, act: str) -> None:
    for gated in (False, True):
        case = make(kind, 70, 96)
        w = case.pack(gated=gated)
        columns = w.columns
        x, bias = rows_of(9, 96, torch.bfloat16), torch.randn(70)
        residual = torch.randn(9, columns).bfloat16()
        got = product(w, x, columns, torch.bfloat16, bias=bias, residual=residual, act=act)
        sums = product(case.pack(), x, 70) + bias
        value = torch.nn.functional.silu(sums[:, :columns]) if act == "silu" else sums[:, :columns]
        wanted = (value * sums[:, columns:] if gated else value) + residual.float()
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_matrices_are_one(kind: str) -> None:
    cases = [make(kind, n, 64) for n in (5, 40, 19)]
    w = sgl_kernel.pack_quantized([c.codes for c in cases], [c.scales for c in cases], kind=kind, group=64)
    x = rows_of(4, 64, torch.bfloat16)
    assert torch.equal(product(w, x, 64), torch.cat([product(c.pack(), x, len(c.codes)) for c in cases], 1))


def test_zero_points_of_one_of_two_matrices() -> None:
    first, second = make("int4", 8, 64, group=32, zeros=True), make("int4", 8, 64, group=32)
    w = sgl_kernel.pack_quantized(
        [first.codes, second.codes], [first.scales, second.scales], [first.zeros, None], kind="int4", group=32
    )
    x = rows_of(2, 64, torch.float32)
    got = product(w, x, 16)
    expect(first, x, got[:, :8])
    expect(second, x, got[:, 8:])


def test_w8a8_sums_are_the_same_on_every_instruction_set(isa: str) -> None:
    case = make("w8a8", 50, 500)
    w = case.pack()
    x = rows_of(20, 500, torch.bfloat16)
    x[3] = 0
    own = product(w, x, 50)
    assert not own[3].any()
    sgl_kernel.force_isa("generic")
    assert torch.equal(product(w, x, 50), own)


def test_what_cannot_be_packed() -> None:
    case = make("int4", 8, 64)
    for options, says in (
        ({"kind": "int3", "group": 64}, "kind"),
        ({"kind": "int4", "group": 0}, "group"),
        ({"kind": "int4", "group": 6}, "multiple of 4"),
        ({"kind": "w8a8", "group": 32}, "one scale per row"),
        ({"kind": "fp8_e4m3", "group": 64}, "element type"),
        ({"kind": "int4", "group": 64, "order": torch.full((64,), 64, dtype=torch.int32)}, "order"),
    ):
        groups = 1 if options["group"] >= 64 or options["group"] == 0 else -(-64 // options["group"])
        with pytest.raises(ValueError, match=says):
            sgl_kernel.pack_quantized([case.codes], [torch.ones(8, groups)], **options)
    with pytest.raises(ValueError, match="scales"):
        sgl_kernel.pack_quantized([case.codes], [torch.ones(8, 2)], kind="int4", group=64)
    assert sgl_kernel.why_not_packable("int4", 1024, 192, False)
    assert not sgl_kernel.why_not_packable("int4", 192, 192, True)


@pytest.mark.parametrize(("kind", "group", "k"), [
    ("int8", None, 896),
    ("int8", 32, 256),
    ("int4", 128, 672),  # segments begin within groups
    ("int4", 64, 192),
    ("w8a8", None, 352),
    ("fp8_e4m3", 128, 1184),
    ("fp8_e5m2", None, 64),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_share_a_sum(kind: str, group: int | None, k: int, dtype: torch.dtype) -> None:
    """2, 4 or 8 parts of K, added as a tree, have the bits of one weight that adds eight segments itself."""
    case = make(kind, 40, k, group=group, zeros=kind == "int4")
    whole = case.pack(segments=8)
    assert (whole.segments, whole.k) == (8, k)
    for m in (1, 2, 7, 100):
        x = rows_of(m, k, dtype)
        wanted = product(whole, x, 40)
        expect(case, x, wanted, 8)
        for ranks in (2, 4, 8):
            sums = [product(share(case, rank, ranks), part(x, rank, ranks), 40) for rank in range(ranks)]
            while len(sums) > 1:
                sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
            assert torch.equal(sums[0], wanted), (m, ranks)


def part(x: Tensor, rank: int, ranks: int) -> Tensor:
    """The columns of one rank."""
    return x.chunk(ranks, 1)[rank]


def share(case: Case, rank: int, ranks: int) -> object:
    """What one rank has of a matrix: its columns, and the scales of the groups that they lie in."""
    codes = part(case.codes, rank, ranks).contiguous()
    k = codes.shape[1]
    if case.group >= case.codes.shape[1]:
        groups, lead = slice(0, 1), 0
    else:
        groups, lead = slice(rank * k // case.group, -(-(rank + 1) * k // case.group)), rank * k % case.group
    scales = case.scales[:, groups].contiguous()
    zeros = None if case.zeros is None else [case.zeros[:, groups].contiguous()]
    return sgl_kernel.pack_quantized(
        [codes], [scales], zeros, kind=case.kind, group=case.group, lead=lead, segments=8 // ranks
    )


def test_impossible_segments() -> None:
    case = make("int8", 8, 96, order=True)
    with pytest.raises(ValueError, match="one segment"):
        case.pack(segments=2)
    for segments, says in ((0, "segments"), (3, "segments"), (5, "segments"), (16, "segments")):
        with pytest.raises(ValueError, match=says):
            make("int8", 8, 96).pack(segments=segments)
