"""Element types: every value of the narrow ones, and the rounding of float32."""

import pytest
import sgl_kernel as kernels
import torch

NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


@pytest.mark.parametrize("dtype", NARROW)
def test_every_value_widens_exactly(dtype):
    bits = 8 * dtype.itemsize
    x = torch.arange(2**bits).to(torch.uint8 if bits == 8 else torch.uint16).view(dtype).reshape(16, -1)[:, :-3]
    y = torch.full(x.shape, 7.0)
    kernels.convert(x, y)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(dtype):
    x = torch.randn(64, 101) * torch.logspace(-9, 6, 101)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    halfway = torch.arange(0x3F80, 0x4080).to(torch.int32) * 65536 + 32768
    x[1, :100] = halfway[:100].view(torch.float32)
    y = torch.zeros(x.shape, dtype=dtype)
    kernels.convert(x, y)
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_checksum_sees_every_change():
    x = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    seen = {kernels.checksum(x), kernels.checksum(x, 1), kernels.checksum(x[:-1]), kernels.checksum(x[1:])}
    for i in range(x.numel()):
        changed = x.clone()
        changed[i] ^= 1
        seen.add(kernels.checksum(changed))
    assert len(seen) == x.numel() + 4
