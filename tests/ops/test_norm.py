"""norm against PyTorch eager and a float64 truth: values, gradients, layouts, errors, tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from truth import assert_as_exact, assert_same_bits_for_any_threads, leaves, run

from fastft.ops.norm import (
    _layer_norm,
    _layer_norm_backward,
    _rms_norm,
    _rms_norm_backward,
    layer_norm,
    rms_norm,
)


@pytest.fixture(autouse=True)
def _kernels_at_any_size(monkeypatch):
    """Small inputs, as most here are, would go to PyTorch's own operators."""
    monkeypatch.setattr("fastft.ops.norm._EAGER_BELOW", 0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager_rms_norm(x, residual, weight, offset):
    """As transformers' LlamaRMSNorm, or GemmaRMSNorm with offset 1."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    if offset:
        y = (y * (offset + weight.to(wide.dtype))).to(x.dtype)
    elif weight is not None:
        y = (weight * y.to(x.dtype)).to(x.dtype)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


def fused_rms_norm(x, residual, weight, offset):
    return rms_norm(x, weight, 1e-6, residual=residual, offset=offset)


def eager_layer_norm(x, residual, weight, bias):
    total = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, 1e-5)
    return y if residual is None else (y, total)


def fused_layer_norm(x, residual, weight, bias):
    return layer_norm(x, weight, bias, 1e-5, residual=residual)


def inputs(dtype, shape, residual):
    def make(*sizes):
        return torch.randn(*sizes).to(dtype).requires_grad_()

    x = make(*shape)
    return x, make(*shape) if residual else None, make(shape[-1]), make(shape[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_as_exact_as_eager(isa, dtype, residual):
    for shape in [(1, 9), (3, 17), (2, 5, 64), (33, 100), (70, 577)]:
        x, res, weight, bias = inputs(dtype, shape, residual)
        for offset in (0.0, 1.0):
            assert_as_exact(fused_rms_norm, eager_rms_norm, (x, res, weight, offset))
        assert_as_exact(fused_rms_norm, eager_rms_norm, (x, res, None, 0.0))
        assert_as_exact(fused_layer_norm, eager_layer_norm, (x, res, weight, bias))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(9, 200), st.sampled_from(DTYPES), st.booleans())
def test_any_shape(rows, hidden, dtype, residual):
    x, res, weight, bias = inputs(dtype, (rows, hidden), residual)
    assert_as_exact(fused_rms_norm, eager_rms_norm, (x, res, weight, 0.0))
    assert_as_exact(fused_layer_norm, eager_layer_norm, (x, res, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    base = torch.randn(4, 6, 50).to(dtype)
    for x in (base[:, ::2], base.transpose(0, 1), base.transpose(0, 2), base[..., ::3]):
        x = x.detach().requires_grad_()
        weight = torch.randn(x.shape[-1]).to(dtype).requires_grad_()
        assert_as_exact(fused_rms_norm, eager_rms_norm, (x, None, weight, 0.0))


def test_weight_of_another_dtype_and_frozen_weight():
    x = torch.randn(9, 65).bfloat16().requires_grad_()
    weight = torch.randn(65, requires_grad=True)
    rms_norm(x, weight).sum().backward()
    assert weight.grad.dtype == torch.float32
    (wanted,) = torch.autograd.grad(
        eager_rms_norm(
            x.detach().double(), None, w := weight.detach().double().requires_grad_(), 0.0
        ).sum(),
        w,
    )
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-5, atol=1e-5)
    (before,) = torch.autograd.grad(rms_norm(x, weight).sum(), x)
    (frozen,) = torch.autograd.grad(rms_norm(x, weight.detach()).sum(), x)
    torch.testing.assert_close(frozen, before)


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_tiny_hidden_sizes(hidden):
    """Gradients cancel to almost nothing here, so the error is measured against their terms."""
    x, _, weight, bias = inputs(torch.float32, (6, hidden), False)
    for fused, eager, rest in (
        (fused_rms_norm, eager_rms_norm, (weight, 0.0)),
        (fused_layer_norm, eager_layer_norm, (weight, bias)),
    ):
        out, (dx, *_) = run(fused, (x, None, *rest))
        wide = leaves((x, None, *rest), torch.float64)
        truth, (wanted, *_) = run(eager, wide)
        torch.testing.assert_close(out[0].double(), truth[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wide", [1e4, 1e-4])
def test_rows_far_from_zero(wide):
    x = (torch.randn(5, 300) + 3 * wide).requires_grad_()
    weight, bias = torch.randn(300).requires_grad_(), torch.randn(300).requires_grad_()
    assert_as_exact(fused_layer_norm, eager_layer_norm, (x, None, weight, bias))


@pytest.mark.parametrize("std", [1e-3, 0.0])
def test_rows_next_to_zero(isa, std):
    """Where eps decides: of numbers near 1 it changes less than a kernel's last place."""
    x = (std * torch.randn(5, 300)).requires_grad_()
    weight, bias = torch.randn(300).requires_grad_(), torch.randn(300).requires_grad_()
    assert_as_exact(fused_rms_norm, eager_rms_norm, (x, None, weight, 0.0))
    assert_as_exact(fused_layer_norm, eager_layer_norm, (x, None, weight, bias))


def test_gradcheck_of_the_reference():
    x, res, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((4, 6), (4, 6), (6,), (6,))
    )
    assert torch.autograd.gradcheck(fused_rms_norm, (x, res, weight, 1.0))
    assert torch.autograd.gradcheck(fused_layer_norm, (x, res, weight, bias))


def test_same_bits_for_any_thread_count():
    x, res, weight, bias = inputs(torch.float32, (301, 130), True)

    def bits():
        root, _ = rms_norm(x, weight, residual=res)
        layer, _ = layer_norm(x, weight, bias, residual=res)
        gradients = torch.autograd.grad((root * root + layer * layer).sum(), (x, weight, bias))
        return root, layer, *gradients

    assert_same_bits_for_any_threads(bits)


def test_opcheck():
    x, res, w = torch.randn(5, 20), torch.randn(5, 20), torch.randn(20)
    y, total, mean, rstd = _layer_norm.op(x, res, w, w, 1e-5)
    opcheck(_rms_norm.op, (x, None, w, 1e-6, 0.0))
    opcheck(_rms_norm.op, (x, res, None, 1e-6, 1.0))
    opcheck(_rms_norm_backward.op, (y, x, total, w, rstd, 1.0, True))
    opcheck(_layer_norm.op, (x, res, w, w, 1e-5))
    opcheck(_layer_norm_backward.op, (y, None, total, w, mean, rstd, True, False))


def test_compiles_in_one_graph():
    x, res, weight, bias = inputs(torch.float32, (8, 40), True)
    for fused, args in (
        (fused_rms_norm, (x, res, weight, 1.0)),
        (fused_layer_norm, (x, res, weight, bias)),
    ):
        assert_as_exact(torch.compile(fused, fullgraph=True), fused, args)


def test_autocast_leaves_the_result_in_float32():
    x, weight = torch.randn(4, 32), torch.randn(32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, weight)
    torch.testing.assert_close(y, eager_rms_norm(x, None, weight, 0.0))


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="weight: expected shape"):
        rms_norm(x, torch.randn(7))
    with pytest.raises(ValueError, match="residual: expected shape"):
        layer_norm(x, residual=torch.randn(2, 7))
    with pytest.raises(TypeError, match="x: expected a floating-point"):
        rms_norm(torch.ones(2, 8, dtype=torch.long))
    with pytest.raises(TypeError, match="bias: expected a floating-point"):
        layer_norm(x, torch.randn(8), torch.ones(8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="x: expected at least one dimension"):
        rms_norm(torch.tensor(1.0))
