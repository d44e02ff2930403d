"""The Triton norms, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import norm
from same import assert_same

from fastft.ops.norm import (
    _layer_norm,
    _layer_norm_backward,
    _rms_norm,
    _rms_norm_backward,
)


def both(shape, dtype, residual, x=None, dy=None):
    """RMSNorm and LayerNorm, forward and backward."""
    first, res, second, dtotal = (torch.randn(*shape).to(dtype) for _ in range(4))
    x, dy = first if x is None else x, second if dy is None else dy
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1])
    res, dtotal = (res, dtotal) if residual else (None, None)
    assert_same(norm.rms_norm, _rms_norm, (x, res, weight, 1e-6, 1.0))
    assert_same(norm.rms_norm, _rms_norm, (x, res, None, 1e-6, 0.0))
    assert_same(norm.layer_norm, _layer_norm, (x, res, weight, bias, 1e-5))
    _, total, mean, rstd = _layer_norm.reference(x, res, weight, bias, 1e-5)
    total = total if residual else x
    *_, scale = _rms_norm.reference(total, None, weight, 1e-6, 1.0)
    for needed in (True, False):
        args = (dy, dtotal, total, weight, scale, 1.0, needed)
        assert_same(norm.rms_norm_backward, _rms_norm_backward, args)
        args = (dy, dtotal, total, weight, mean, rstd, True, needed)
        assert_same(norm.layer_norm_backward, _layer_norm_backward, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 128), (3, 1000)])
def test_norms(dtype, residual, shape):
    both(shape, dtype, residual)


def test_rows_that_lie_apart():
    base = torch.randn(12, 3, 40)
    x, dy = base[::2, 1], base[1::2, 2]
    args = (x, None, torch.randn(40), 1e-6, 0.0)
    assert_same(norm.rms_norm, _rms_norm, args)
    *_, rstd = _rms_norm.reference(*args)
    assert_same(norm.rms_norm_backward, _rms_norm_backward, (dy, None, x, args[2], rstd, 0.0, True))


def test_no_rows():
    empty = torch.randn(0, 16)
    assert_same(norm.rms_norm, _rms_norm, (empty, None, torch.ones(16), 1e-6, 0.0))


def test_rows_next_to_zero():
    """Where eps decides: of numbers near 1 it changes less than a kernel's last place."""
    both((5, 33), torch.float32, False, 1e-3 * torch.randn(5, 33))
    both((5, 33), torch.float32, False, torch.zeros(5, 33))
