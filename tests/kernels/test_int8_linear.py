"""The Triton passes around integer products, interpreted, against the references."""

import pytest
import torch
from fastft.kernels import int8_linear

from fastft.ops.int8_linear import _round_rows, _scale_sums_


def rounded(x, factors):
    values, scale = int8_linear.round_rows(x, factors)
    wanted, size = _round_rows.reference(x, factors)
    assert values.dtype is torch.int8 and scale.dtype is torch.float32
    assert values.shape == wanted.shape and values.is_contiguous()
    torch.testing.assert_close(scale, size, rtol=2e-7, atol=0, equal_nan=True)
    # Halves of a step may fall either way.
    other = (values.int() - wanted.int()).abs()
    assert not other.numel() or (other.max() <= 1 and other.double().mean() < 0.02)
    return values, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 576), (2, 2 * int8_linear.LONGEST + 7)])
def test_rounding(dtype, factors, shape):
    x = (torch.randn(*shape) * torch.logspace(-2, 2, shape[0])[:, None]).to(dtype)
    values, _ = rounded(x, torch.rand(shape[1]) + 0.1 if factors else None)
    assert bool((values.abs().amax(1) == 127).all())


def test_rows_that_lie_apart_are_zero_or_not_finite():
    x = torch.randn(12, 3, 40)[::2, 1]
    x[1], x[2, 7], x[3, 39] = 0, float("nan"), float("inf")
    values, scale = rounded(x, None)
    assert scale[1] == 0 and not values[1:4].any() and bool(scale[2:4].isnan().all())
    rounded(torch.randn(0, 16), None)
    even = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert int8_linear.round_rows(even, None)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (2, int8_linear.LONGEST + 9)])
def test_scaling_sums(extras, shape):
    sums = torch.randint(-(2**22), 2**22, shape, dtype=torch.int32)
    a, wide = torch.rand(shape[0]), torch.randn(shape[0], shape[1] + 3)
    b, bias, total = torch.rand(shape[1]), torch.randn(shape[1]), wide[:, : shape[1]]
    b, bias, total = (b, bias, total) if extras else (None, None, None)
    wanted = sums.clone()
    _scale_sums_.reference(wanted, a, b, bias, total)
    int8_linear.scale_sums_(sums, a, b, bias, total)
    wanted, got = wanted.view(torch.float32), sums.view(torch.float32)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
