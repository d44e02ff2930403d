"""round_rows_fp8: e4m3 to the nearest, no overflow, no scale. Of int8: test_int8_linear.py."""

import pytest
import torch
from torch.library import opcheck

from fastft.ops.round_rows import FP8, _round_rows_fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def nearest(x):
    """The nearest numbers of e4m3, of two the even one, by their definition; x float64 to 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp_min(2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return (x / step).round() * step  # round is to even


def test_to_the_nearest_number_of_two_the_even_one():
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # all up to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    both = torch.cat([numbers, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    x = torch.stack([both, -both, torch.rand(len(both)) * 448])
    x[2, 0] = 448  # a peak of 448: values are rounded as they are
    values, scale = _round_rows_fp8(x, None)
    assert values.dtype is FP8 and bool((scale == 1).all())
    assert torch.equal(values.double(), nearest(x.double()))
    assert torch.equal(values[0, :127].float(), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [False, True])
def test_rounding(dtype, factors):
    for rows, columns in [(1, 1), (5, 33), (70, 576)]:
        x = (torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
        times = torch.rand(columns) + 0.1 if factors else None
        values, scale = _round_rows_fp8(x, times)
        wide = x.double() * (1 if times is None else times.double())
        torch.testing.assert_close(scale.double(), wide.abs().amax(1) / 448, rtol=2e-7, atol=0)
        wide = wide / scale.double()[:, None]
        step = 2.0 ** (torch.floor(torch.log2(wide.abs().clamp_min(2.0**-6))) - 3)
        assert bool(((values.double() - wide).abs() <= 0.5001 * step).all())
        assert bool((values.float().abs().amax(1) == 448).all())


def test_nothing_overflows():
    """Whatever a float32 peak is divided by: it becomes 448 and never NaN, which is next to it."""
    bits = torch.randint(0x00800000, 0x7F7FFFFF, (4000,), dtype=torch.int32)
    peaks = bits.view(torch.float32)[:, None]
    peaks = torch.cat([peaks, torch.tensor([[torch.finfo(torch.float32).max], [6e-36]])])
    x = torch.cat([peaks, -peaks, peaks.nextafter(torch.zeros(1)), peaks / 3], 1)
    values, scale = _round_rows_fp8(x, None)
    assert bool(scale.isfinite().all()) and bool(values.float().isfinite().all())
    kept = scale > 0
    assert bool((values[kept].float()[:, :2] == torch.tensor([448.0, -448.0])).all())
    back = values[kept].double() * scale[kept].double()[:, None]
    torch.testing.assert_close(back, x[kept].double(), rtol=2**-4, atol=0)
    assert bool((peaks[~kept] < 448 * 1.2e-38).all()) and not values[~kept].float().any()


def test_rows_that_are_zero_or_not_finite():
    x = torch.randn(5, 40)
    x[1], x[2, 7], x[3, 39] = 0, float("nan"), float("inf")
    values, scale = _round_rows_fp8(x, None)
    assert scale[1] == 0 and not values[1:4].float().any()
    assert bool(scale[2:4].isnan().all()) and bool(scale[[0, 4]].isfinite().all())


def test_strided_empty_and_float64():
    wide = torch.randn(6, 80)
    for x in (wide[:, 16:56], wide[::2], wide[:0], wide[:, :0]):
        values, scale = _round_rows_fp8(x, None)
        wanted, size = _round_rows_fp8(x.contiguous(), None)
        assert values.shape == x.shape and torch.equal(scale, size)
        assert torch.equal(values.view(torch.int8), wanted.view(torch.int8))
    assert _round_rows_fp8(wide.double(), None)[1].dtype is torch.float32


def test_opcheck():
    # Not test_schema: it compares by operators that PyTorch lacks for fp8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(_round_rows_fp8.op, (torch.randn(7, 20), torch.rand(20)), test_utils=tests)
