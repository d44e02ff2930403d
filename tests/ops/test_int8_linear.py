"""int8_linear: exact products of integers, rounding as described, gradients, bits, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from truth import assert_same_bits_for_any_threads

from fastft.ops.int8_linear import (
    Rounded,
    _int8_columns,
    _int8_product,
    _round_apart,
    _scale_sums_,
    int8_linear,
    int8_product,
)
from fastft.ops.lora import LoraLinear, lora, lora_shared
from fastft.ops.lora_mlp import lora_mlp
from fastft.ops.quantized_linear import QuantizedWeight, dequantize, quantize
from fastft.ops.round_rows import _round_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def product_inputs(rows, inner, out, transposed, scaled=True):
    b = numbers(inner, out) if transposed else numbers(out, inner)
    extra = (torch.rand(out), torch.randn(out)) if scaled else (None, None)
    return numbers(rows, inner), torch.rand(rows), b, *extra, transposed


def what_stands_for(x):
    """The rounded x, columns apart among the others, in float64."""
    rounded = Rounded.of(x)
    wide = rounded.values.double() * rounded.scale.double()[:, None]
    wide[:, rounded.columns] = rounded.apart.double()
    return wide


def exact(a, a_scale, b, b_scale, bias, transposed):
    y = a.double() @ (b.double() if transposed else b.double().t()) * a_scale.double()[:, None]
    y = y if b_scale is None else y * b_scale.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("transposed", [False, True])
def test_product_over_one_input_or_to_one_output(transposed):
    """torch._int_mm gives garbage for a matrix whose strides are both 1."""
    for sizes in ((9, 1, 75), (9, 75, 1), (1, 1, 3), (1, 3, 1), (1, 1, 1)):
        args = product_inputs(*sizes, transposed)
        torch.testing.assert_close(int8_product(*args).double(), exact(*args), rtol=1e-5, atol=1e-2)


@given(
    st.integers(0, 140), st.integers(0, 100), st.integers(0, 80), st.booleans(), st.booleans()
)  # fmt: skip
def test_product_of_any_shape(rows, inner, out, transposed, scaled):
    args = product_inputs(rows, inner, out, transposed, scaled)
    y = _int8_product(*args)
    assert y.shape == (rows, out) and y.dtype is torch.float32
    torch.testing.assert_close(y.double(), exact(*args), rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(int8_product(*args), y, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_are_exact(isa, transposed):
    """The largest there are, and ones that float32 does not hold, before the scales."""
    for rows, inner, out in [(130, 1536, 40), (3, 4096, 33), (2, 31, 5)]:
        a, _, b, *_ = product_inputs(rows, inner, out, transposed)
        a[0], b[:] = 127, torch.where(b < 0, -127, 127)
        y = _int8_product(a, torch.ones(rows), b, None, None, transposed)
        truth = a.double() @ (b.double() if transposed else b.double().t())
        assert torch.equal(y, truth.float())


def test_product_has_the_same_bits_for_any_threads(isa):
    for transposed in (False, True):
        args = product_inputs(150, 200, 70, transposed)
        assert_same_bits_for_any_threads(lambda args=args: _int8_product(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [False, True])
def test_rounding(isa, dtype, factors):
    for rows, columns in [(1, 1), (5, 33), (70, 576)]:
        x = (torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
        times = torch.rand(columns) + 0.1 if factors else None
        values, scale = _round_rows(x, times)
        wide = x.double() * (1 if times is None else times.double())
        torch.testing.assert_close(scale.double(), wide.abs().amax(1) / 127, rtol=2e-7, atol=0)
        gap = (values.double() * scale.double()[:, None] - wide).abs()
        assert bool((gap <= 0.50001 * scale[:, None]).all())
        assert bool((values.abs().amax(1) == 127).all())
        # Halves of a step may fall either way.
        other = (values.int() - _round_rows.reference(x, times)[0].int()).abs()
        assert other.max() <= 1 and other.double().mean() < 0.02


def test_rows_that_are_zero_or_not_finite(isa):
    x = torch.randn(5, 40)
    x[1], x[2, 7], x[3, 39] = 0, float("nan"), float("inf")
    values, scale = _round_rows(x, None)
    assert scale[1] == 0 and not values[1].any()
    assert bool(scale[2:4].isnan().all()) and bool(scale[[0, 4]].isfinite().all())
    weight = quantize(torch.randn(6, 40))
    y = int8_linear(x, weight)
    assert bool(y[2:4].isnan().all()) and bool((y[1] == 0).all())
    assert bool(y[[0, 4]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_apart(isa, dtype):
    """The largest columns are copied and stay out of the rounding of the others."""
    for rows, columns, count in [(0, 5, 2), (1, 1, 1), (5, 33, 0), (5, 33, 33), (70, 576, 16)]:
        x = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
        values, scale, chosen, apart = _round_apart(x, count)
        peaks = x.abs().amax(0).float() if rows else torch.zeros(columns)
        rest = torch.ones(columns, dtype=torch.bool)
        rest[chosen] = False
        assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == count
        if 0 < count < columns:
            assert peaks[chosen].min() >= peaks[rest].max()
        assert torch.equal(apart, x[:, chosen].float())
        assert not values[:, chosen].any()
        wanted = _round_rows(x * rest, None)
        assert torch.equal(values, wanted[0]) and torch.equal(scale, wanted[1])
        assert torch.equal(chosen, _round_apart.reference(x, count)[2])


def test_columns_of_a_weight(isa):
    for out, inner, chosen in [(1, 1, [0]), (90, 64, [0, 7, 63]), (700, 40, []), (0, 8, [1])]:
        stored = numbers(out, inner + 5)[:, :inner]
        scale, chosen = torch.rand(out), torch.tensor(chosen, dtype=torch.int64)
        columns = _int8_columns(stored, scale, chosen)
        assert torch.equal(columns, (stored[:, chosen] * scale[:, None]).t())


def test_large_columns_do_not_spoil_the_others():
    """Two columns a thousand times as large, as activations have them: the rest keeps its bits."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(40, 128) * 0.1)
    x = torch.randn(30, 128)
    x[:, [5, 77]] *= 1000
    rest = x.index_fill(1, torch.tensor([5, 77]), 0)
    large = x - rest
    wide = dequantize(weight, torch.float64).t()
    left = int8_linear(x, weight).double() - large.double() @ wide
    truth = rest.double() @ wide
    assert (left - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_gradients_against_the_formula(dtype, bias):
    """y and dx in float64 from the rounded numbers, and near those of the exact layer."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(90, 64) * 0.1)
    x = torch.randn(2, 33, 64).to(dtype).requires_grad_()
    b = torch.randn(90, requires_grad=True) if bias else None
    y = int8_linear(x, weight, b)
    dy = torch.randn(2, 33, 90).to(dtype)
    y.backward(dy)
    assert y.dtype is dtype and x.grad.dtype is dtype
    wide = what_stands_for(x.detach().flatten(0, 1))
    truth = wide @ dequantize(weight, torch.float64).t() + (0 if b is None else b.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.flatten(0, 1).double(), truth, rtol=eps, atol=1e-5)
    scale = weight.scale[:, 0]
    grads, sizes = _round_rows(dy.flatten(0, 1), scale)
    dx = (grads.double() * sizes.double()[:, None]) @ weight.values.double()
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), dx, rtol=eps, atol=1e-5)
    exact_dx = dy.double() @ dequantize(weight, torch.float64)
    assert (x.grad.double() - exact_dx).norm() < 0.02 * exact_dx.norm()
    if bias:
        torch.testing.assert_close(b.grad.double(), dy.double().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_frozen_inputs_cost_no_product(monkeypatch):
    weight = quantize(torch.randn(8, 16))
    bias = torch.zeros(8, requires_grad=True)
    y = int8_linear(torch.randn(3, 16), weight, bias)
    with monkeypatch.context() as without:
        without.setattr("fastft.ops.int8_linear.int8_product", None)
        y.sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 3.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert int8_linear(torch.randn(3, 16), weight).dtype is torch.bfloat16


@pytest.mark.parametrize("extras", [False, True])
def test_scaled_sums(isa, extras):
    """Over the sums themselves, one rounding a step; total may be a slice."""
    for rows, columns in [(0, 5), (1, 1), (3, 33), (70, 576)]:
        sums = torch.randint(-(2**22), 2**22, (rows, columns), dtype=torch.int32)
        a = torch.rand(rows)
        b, bias, total = torch.rand(columns), torch.randn(columns), torch.randn(rows, columns + 3)
        b, bias, total = (b, bias, total[:, :columns]) if extras else (None, None, None)
        truth = sums.double() * a.double()[:, None]
        if extras:
            truth = truth * b.double() + bias.double() + total.double()
        size = float(truth.abs().max()) if truth.numel() else 0.0
        _scale_sums_(sums, a, b, bias, total)
        gap = (sums.view(torch.float32).double() - truth).abs()
        assert not gap.numel() or float(gap.max()) <= 2**-22 * size


@pytest.mark.parametrize("transposed", [False, True])
def test_product_onto_a_total(isa, transposed):
    a, a_scale, b, *_ = product_inputs(40, 64, 48, transposed)
    total = torch.randn(40, 48)
    y = int8_product(a, a_scale, b, transposed=transposed, total=total.clone())
    truth = exact(a, a_scale, b, None, None, transposed) + total.double()
    torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-2)


def adapter(rank, inner, out):
    a = (torch.randn(rank, inner) * 0.1).requires_grad_()
    return a, (torch.randn(out, rank) * 0.1).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_over_int8_weights(dtype):
    """Values and all gradients in float64 from the rounded numbers; two share one rounding."""
    torch.manual_seed(0)
    weights = [quantize(torch.randn(out, 64) * 0.1) for out in (90, 40)]
    bias = torch.randn(90, requires_grad=True)
    adapters = [adapter(4, 64, 90), adapter(3, 64, 40)]
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    linears = [LoraLinear(weights[0], bias, *adapters[0], 2.0),
               LoraLinear(weights[1], None, *adapters[1], 0.5)]  # fmt: skip
    ys = lora_shared(x, linears)
    dys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, dys)
    wide, dx = x.detach().double(), 0
    rounded = what_stands_for(x.detach())
    tight = dict(rtol=4 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)
    for y, dy, weight, each in zip(ys, dys, weights, linears, strict=True):
        a, b = each.a.detach().double(), each.b.detach().double()
        base = rounded @ dequantize(weight, torch.float64).t()
        truth = base + (0 if each.bias is None else bias.detach().double())
        truth = truth + each.scale * wide @ a.t() @ b.t()
        torch.testing.assert_close(y.double(), truth, **tight)
        grads, sizes = _round_rows(dy, weight.scale[:, 0])
        dx = dx + (grads.double() * sizes.double()[:, None]) @ weight.values.double()
        narrow = each.scale * dy.double() @ b
        dx = dx + narrow @ a
        torch.testing.assert_close(each.a.grad.double(), narrow.t() @ wide, rtol=1e-4, atol=1e-4)
        db = each.scale * dy.double().t() @ (wide @ a.t())
        torch.testing.assert_close(each.b.grad.double(), db, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), dx, **tight)
    # Rounded once to the type of x.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(bias.grad.double(), dys[0].double().sum(0), rtol=eps, atol=1e-5)


def test_gated_mlp_over_int8_weights():
    sizes = ((64, 90), (64, 90), (90, 64))
    weights = [quantize(torch.randn(out, inner) * 0.1) for inner, out in sizes]
    adapters = [adapter(4, *size) for size in sizes]
    x = torch.randn(5, 7, 64, requires_grad=True)

    def compute(together):
        linears = [LoraLinear(w, None, *ab, 2.0) for w, ab in zip(weights, adapters, strict=True)]
        leaves = [x, *(t for ab in adapters for t in ab)]
        if together:
            y = lora_mlp(x, *linears)
        else:
            gate, up = lora(x, linears[0]), lora(x, linears[1])
            y = lora(torch.nn.functional.silu(gate) * up, linears[2])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for ours, wanted in zip(compute(True), compute(False), strict=True):
        assert (ours - wanted).norm() < 2e-2 * wanted.norm()  # roundings may fall the other way


def test_adapters_over_int8_weights_compile_and_cast():
    weight, (a, b) = quantize(torch.randn(24, 32)), adapter(4, 32, 24)
    x = torch.randn(20, 32, requires_grad=True)
    function = torch.compile(lambda x: lora(x, LoraLinear(weight, None, a, b)), fullgraph=True)
    torch.testing.assert_close(function(x), lora(x, LoraLinear(weight, None, a, b)))
    with torch.autocast("cpu", torch.bfloat16):
        assert lora(x, LoraLinear(weight, None, a, b)).dtype is torch.bfloat16
    for wrong in (quantize(torch.randn(24, 32), 4), QuantizedWeight(torch.randn(24, 32))):
        with pytest.raises(TypeError, match="weight: expected int8"):
            lora(x, LoraLinear(wrong, None, a, b))


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    sums = torch.randint(-99, 99, (7, 20), dtype=torch.int32)
    opcheck(_scale_sums_.op, (sums, torch.rand(7), torch.rand(20), None, torch.randn(7, 20)))
    opcheck(_int8_product.op, product_inputs(7, 20, 9, transposed))
    opcheck(_round_rows.op, (torch.randn(7, 20), torch.rand(20)))
    opcheck(_round_apart.op, (torch.randn(7, 20), 3))
    opcheck(_int8_columns.op, (numbers(9, 20), torch.rand(9), torch.tensor([3, 8])))


def test_bad_input():
    weight = quantize(torch.randn(8, 32))
    with pytest.raises(ValueError, match="32 inputs"):
        int8_linear(torch.randn(3, 31), weight)
    with pytest.raises(TypeError, match="floating point"):
        int8_linear(torch.ones(3, 32, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="bias"):
        int8_linear(torch.randn(3, 32), weight, torch.zeros(7))
    for other in (quantize(torch.randn(8, 32), 4), QuantizedWeight(torch.randn(8, 32))):
        with pytest.raises(TypeError, match="weight"):
            int8_linear(torch.randn(3, 32), other)
    with pytest.raises(RuntimeError, match="create_graph"):
        x = torch.randn(3, 32, requires_grad=True)
        torch.autograd.grad(int8_linear(x, weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="total: expected shape"):
        _scale_sums_(torch.zeros(3, 8, dtype=torch.int32), torch.rand(3), None, None, numbers(3, 7))
    with pytest.raises(RuntimeError, match="b: expected shape"):
        _int8_product(numbers(3, 32), torch.rand(3), numbers(8, 31), None, None, False)
    with pytest.raises(RuntimeError, match="columns: expected 0 to 7"):
        _int8_columns(numbers(3, 8), torch.rand(3), torch.tensor([8]))
    with pytest.raises(RuntimeError, match="count: expected 0 to 4"):
        _round_apart(torch.randn(2, 4), 5)
