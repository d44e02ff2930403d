"""The Triton pass that rounds rows to eight bits, interpreted, against the references."""

import pytest
import torch
from fastft.kernels import round_rows

from fastft.ops.round_rows import _round_rows, _round_rows_fp8

FP8 = torch.float8_e4m3fn


def check(x, factors, fp8):
    launch = round_rows.round_rows_fp8 if fp8 else round_rows.round_rows
    reference = (_round_rows_fp8 if fp8 else _round_rows).reference
    (values, scale), (wanted, size) = launch(x, factors), reference(x, factors)
    assert values.dtype is (FP8 if fp8 else torch.int8) and scale.dtype is torch.float32
    assert values.shape == wanted.shape and values.is_contiguous()
    torch.testing.assert_close(scale, size, rtol=2e-7, atol=0, equal_nan=True)
    # Halves of a step may fall either way.
    got, want = (v.view(torch.int8).int() for v in (values, wanted))
    other = (got - want).abs()
    assert not other.numel() or (other.max() <= 1 and other.double().mean() < 0.02)
    return values, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 576), (2, 2 * round_rows.LONGEST + 7)])
def test_rounding(dtype, fp8, factors, shape):
    x = (torch.randn(*shape) * torch.logspace(-2, 2, shape[0])[:, None]).to(dtype)
    values, _ = check(x, torch.rand(shape[1]) + 0.1 if factors else None, fp8)
    assert bool((values.float().abs().amax(1) == (448 if fp8 else 127)).all())


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_that_lie_apart_are_zero_or_not_finite(fp8):
    x = torch.randn(12, 3, 40)[::2, 1]
    x[1], x[2, 7], x[3, 39] = 0, float("nan"), float("inf")
    values, scale = check(x, None, fp8)
    assert scale[1] == 0 and not values[1:4].float().any() and bool(scale[2:4].isnan().all())
    check(torch.randn(0, 16), None, fp8)


def test_the_even_integer_of_two():
    even = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert round_rows.round_rows(even, None)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_every_number_of_e4m3_and_what_lies_between():
    """As PyTorch rounds them: numbers, middles, and the neighbours of both."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles])
    row = torch.cat([exact, exact.nextafter(torch.tensor(torch.inf))[:-1],
                     exact.nextafter(torch.tensor(0.0)), torch.rand(4000) * 448])  # fmt: skip
    row = row[row <= 448]  # a peak of 448: values are rounded as they are
    x = torch.stack([row, -row])
    values, scale = round_rows.round_rows_fp8(x, None)
    assert bool((scale == 1).all())
    assert torch.equal(values.view(torch.uint8), x.to(FP8).view(torch.uint8))
