"""fp8_linear: products by two ways, gradients, adapters over it, what it needs, bad input."""

import pytest
import torch
from torch.library import opcheck

from fastft.ops import base_product, fp8_linear
from fastft.ops.fp8_linear import (
    _fp8_product,
    _library_product,
    fp8_product,
    quantize_fp8,
    why_not,
)
from fastft.ops.lora import LoraLinear, lora, lora_shared
from fastft.ops.lora_mlp import lora_mlp
from fastft.ops.quantized_linear import QuantizedWeight, dequantize, quantize, quantized_linear
from fastft.ops.round_rows import FP8, _round_rows_fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(got, truth):
    """To one rounding to its type; PyTorch's product on CUDA rounds to bfloat16."""
    dtype = torch.bfloat16 if got.is_cuda else got.dtype
    gap = (got.double() - truth.double()).norm()
    assert gap <= (torch.finfo(dtype).eps + 1e-6) * truth.double().norm()


def what_stands_for(values, scale):
    return values.double() * scale.double()[:, None]


def operands(rows, inner, out, transposed=False):
    a, a_scale = _round_rows_fp8(torch.randn(rows, inner), None)
    b, b_scale = _round_rows_fp8(torch.randn(out, inner), None)
    if transposed:
        b, b_scale = b.float().t().contiguous().to(FP8), None
    return a, a_scale, b, b_scale


def exact(a, a_scale, b, b_scale, bias, transposed):
    b = b.double() if transposed else b.double().t()
    y = what_stands_for(a, a_scale) @ b
    y = y if b_scale is None else y * b_scale.double()
    return y if bias is None else y + bias.double()


def test_rows_that_are_zero_or_not_finite():
    x = torch.randn(5, 48)
    x[1], x[2, 7], x[3, 39] = 0, float("nan"), float("inf")
    y = fp8_linear.fp8_linear(x, quantize_fp8(torch.randn(16, 48)))
    assert bool(y[2:4].isnan().all()) and bool((y[1] == 0).all())
    assert bool(y[[0, 4]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_weight(dtype):
    weight = torch.randn(40, 64).to(dtype) * torch.logspace(-3, 3, 40)[:, None].to(dtype)
    weight[3] = 0
    stored = quantize_fp8(weight)
    assert stored.values.dtype is FP8 and stored.scale.shape == (40, 1) and stored.scale[3] == 0
    again = dequantize(stored, dtype)
    # Three digits, or steps of 2^-9 where numbers are next to zero, whatever its row's size is.
    gap = (dequantize(stored, torch.float64) - weight.double()).abs()
    assert bool((gap <= 2**-4 * weight.double().abs() + 2**-10 * stored.scale).all())
    assert not again[3].any()
    # A saved model has what the numbers stand for: loaded, it has the same numbers.
    assert torch.equal(quantize_fp8(again).values.view(torch.int8), stored.values.view(torch.int8))
    # Small numbers beside a large one keep their digits, as in integers they do not.
    row = torch.tensor([[448.0, 1 / 64, 0.11]])
    torch.testing.assert_close(dequantize(quantize_fp8(row)), row, rtol=2**-4, atol=0)
    assert dequantize(quantize(row))[0, 1] == 0


SIZES = [(33, 64, 48), (1, 16, 16), (0, 16, 16), (5, 33, 16), (5, 32, 17), (3, 0, 16), (3, 16, 0)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(sizes, transposed, dtype):
    """The reference and PyTorch's, which the CPU has too, and gives bfloat16."""
    a, a_scale, b, b_scale = operands(*sizes, transposed)
    for bias in (None, torch.randn(sizes[2])):
        truth = exact(a, a_scale, b, b_scale, bias, transposed)
        args = (a, a_scale, b, b_scale, bias, transposed, dtype)
        for product in (_fp8_product, _library_product):
            y = product(*args)
            assert y.dtype is dtype and y.shape == (sizes[0], sizes[2])
            close(y if product is _fp8_product else y.bfloat16(), truth)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_the_library_is_given(transposed, monkeypatch):
    """What CUDA asks for: the CPU takes the same call, and any layout."""
    calls, library = [], torch._scaled_mm

    def checked(a, b, a_scale, b_scale, *, bias, out_dtype, use_fast_accum):
        (rows, inner), out = a.shape, b.shape[1]
        assert a.is_contiguous() and b.t().is_contiguous()
        assert a_scale.shape == (rows, 1) and b_scale.shape == (1, out)
        for scale in (a_scale, b_scale):
            assert scale.dtype is torch.float32 and scale.is_contiguous()
        assert inner % 16 == 0 and out % 16 == 0 and out_dtype is torch.bfloat16
        assert bias.dtype is torch.bfloat16 and bias.shape == (out,)
        calls.append(rows)
        return library(
            a, b, a_scale, b_scale, bias=bias, out_dtype=out_dtype, use_fast_accum=use_fast_accum
        )

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    for sizes in [(1, 16, 16), (33, 64, 48), (5, 33, 16), (5, 32, 17), (0, 16, 16)]:
        given = operands(*sizes, transposed)
        _library_product(*given, torch.randn(sizes[2]), transposed, torch.float16)
    assert calls == [1, 33]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_gradients_against_the_formula(dtype, bias):
    """y and dx in float64 from the rounded numbers, and near those of the exact layer."""
    torch.manual_seed(0)
    weight = quantize_fp8(torch.randn(96, 64) * 0.1)
    x = torch.randn(2, 33, 64).to(dtype).requires_grad_()
    b = torch.randn(96, requires_grad=True) if bias else None
    y = fp8_linear.fp8_linear(x, weight, b)
    dy = torch.randn(2, 33, 96).to(dtype)
    y.backward(dy)
    assert y.dtype is dtype and x.grad.dtype is dtype
    wide = what_stands_for(*_round_rows_fp8(x.detach().flatten(0, 1), None))
    truth = wide @ dequantize(weight, torch.float64).t() + (0 if b is None else b.double())
    close(y.flatten(0, 1), truth)
    grads = what_stands_for(*_round_rows_fp8(dy.flatten(0, 1), weight.scale[:, 0]))
    close(x.grad.flatten(0, 1), grads @ weight.values.double())
    exact_dx = dy.double() @ dequantize(weight, torch.float64)
    assert (x.grad.double() - exact_dx).norm() < 0.04 * exact_dx.norm()
    if bias:
        torch.testing.assert_close(b.grad.double(), dy.double().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_large_columns_do_not_spoil_the_others():
    """Two columns 200 times as large: the others keep their digits, though none stays apart."""
    torch.manual_seed(0)
    weight = quantize_fp8(torch.randn(48, 128) * 0.1)
    x = torch.randn(30, 128)
    x[:, [5, 77]] *= 200
    values, scale = _round_rows_fp8(x, None)
    rest = [i for i in range(128) if i not in (5, 77)]
    gap = (what_stands_for(values, scale) - x.double())[:, rest]
    assert gap.norm() < 0.03 * x[:, rest].norm()
    y = fp8_linear.fp8_linear(x, weight)
    truth = x.double() @ dequantize(weight, torch.float64).t()
    assert (y - truth).norm() < 0.04 * truth.norm()


def test_frozen_inputs_cost_no_product(monkeypatch):
    weight = quantize_fp8(torch.randn(16, 32))
    bias = torch.zeros(16, requires_grad=True)
    x = torch.randn(3, 32)
    y = fp8_linear.fp8_linear(x, weight, bias)
    with monkeypatch.context() as without:
        without.setattr(fp8_linear, "fp8_product", None)
        y.sum().backward()
    assert torch.equal(bias.grad, torch.full((16,), 3.0))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert fp8_linear.fp8_linear(x, weight).dtype is torch.bfloat16


def adapter(rank, inner, out):
    a = (torch.randn(rank, inner) * 0.1).requires_grad_()
    return a, (torch.randn(out, rank) * 0.1).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_over_fp8_weights(dtype, monkeypatch):
    """Values and all gradients in float64 from the rounded numbers; two share one rounding."""
    torch.manual_seed(0)
    weights = [quantize_fp8(torch.randn(out, 64) * 0.1) for out in (96, 48)]
    bias = torch.randn(96, requires_grad=True)
    adapters = [adapter(4, 64, 96), adapter(3, 64, 48)]
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    linears = [LoraLinear(weights[0], bias, *adapters[0], 2.0),
               LoraLinear(weights[1], None, *adapters[1], 0.5)]  # fmt: skip
    rounded = []

    def counted(given, factors):
        rounded.append(given.shape)
        return _round_rows_fp8(given, factors)

    monkeypatch.setattr(base_product, "_round_rows_fp8", counted)
    ys = lora_shared(x, linears)
    assert rounded == [(33, 64)]
    dys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, dys)
    assert rounded[1:] == [(33, 96), (33, 48)]
    wide, dx = x.detach().double(), 0
    for y, dy, weight, each in zip(ys, dys, weights, linears, strict=True):
        a, b = each.a.detach().double(), each.b.detach().double()
        base = what_stands_for(*_round_rows_fp8(x.detach(), None))
        truth = base @ dequantize(weight, torch.float64).t()
        truth = truth + (0 if each.bias is None else bias.detach().double())
        near(y, truth + each.scale * wide @ a.t() @ b.t())
        grads = what_stands_for(*_round_rows_fp8(dy, weight.scale[:, 0]))
        narrow = each.scale * dy.double() @ b
        dx = dx + grads @ weight.values.double() + narrow @ a
        torch.testing.assert_close(each.a.grad.double(), narrow.t() @ wide, rtol=1e-4, atol=1e-4)
        db = each.scale * dy.double().t() @ (wide @ a.t())
        torch.testing.assert_close(each.b.grad.double(), db, rtol=1e-4, atol=1e-4)
    near(x.grad, dx)
    # Rounded once to the type of x.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(bias.grad.double(), dys[0].double().sum(0), rtol=eps, atol=1e-5)


def near(got, truth):
    """To the roundings of product, adapter and sum, one after the other."""
    dtype = torch.bfloat16 if got.is_cuda else got.dtype
    gap = (got.double() - truth).norm()
    assert gap <= (2 * torch.finfo(dtype).eps + 1e-6) * truth.norm()


def test_gated_mlp_over_fp8_weights():
    sizes = ((64, 96), (64, 96), (96, 64))
    weights = [quantize_fp8(torch.randn(out, inner) * 0.1) for inner, out in sizes]
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
        assert (ours - wanted).norm() < 4e-2 * wanted.norm()  # roundings may fall the other way


def test_adapters_over_fp8_weights_compile_and_cast():
    weight, (a, b) = quantize_fp8(torch.randn(32, 32)), adapter(4, 32, 32)
    x = torch.randn(20, 32, requires_grad=True)
    function = torch.compile(lambda x: lora(x, LoraLinear(weight, None, a, b)), fullgraph=True)
    torch.testing.assert_close(function(x), lora(x, LoraLinear(weight, None, a, b)))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert lora(x, LoraLinear(weight, None, a, b)).dtype is torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    args = operands(7, 32, 16, transposed)
    # Not test_schema: it compares by operators that PyTorch lacks for fp8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (*args, torch.randn(16), transposed, torch.bfloat16)
    opcheck(_fp8_product.op, given, test_utils=tests)


def test_what_a_device_lacks(monkeypatch):
    """The one function that decides, on cards that are not here."""
    cuda = torch.device("cuda")
    assert "lie on cpu" in why_not(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in why_not(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_not(cuda) == "the A100 has compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    assert why_not(cuda) is None
    monkeypatch.setattr(fp8_linear, "_fp8_product", lambda *args: ones(16, 16))
    assert "wrong result" in why_not(cuda)

    def refuses(*args):
        raise RuntimeError("Rowwise scaling is not currently supported on your device\nat …")

    monkeypatch.setattr(fp8_linear, "_fp8_product", refuses)
    assert why_not(cuda).endswith("Rowwise scaling is not currently supported on your device")
    with monkeypatch.context() as other:
        other.setattr(torch.version, "hip", "6.4")
        assert "ROCm" in why_not(cuda)
    monkeypatch.setattr(fp8_linear, "find_spec", lambda name: None)
    assert why_not(cuda) == "triton is not installed"


def test_bad_input():
    weight = quantize_fp8(torch.randn(8, 32))
    with pytest.raises(ValueError, match="32 inputs"):
        fp8_linear.fp8_linear(torch.randn(3, 31), weight)
    with pytest.raises(TypeError, match="floating point"):
        fp8_linear.fp8_linear(torch.ones(3, 32, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="bias"):
        fp8_linear.fp8_linear(torch.randn(3, 32), weight, torch.zeros(7))
    for other in (quantize(torch.randn(8, 32)), QuantizedWeight(torch.randn(8, 32))):
        with pytest.raises(TypeError, match="weight"):
            fp8_linear.fp8_linear(torch.randn(3, 32), other)
    with pytest.raises(RuntimeError, match="create_graph"):
        x = torch.randn(3, 32, requires_grad=True)
        torch.autograd.grad(fp8_linear.fp8_linear(x, weight).sum(), x, create_graph=True)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: expected finite"):
            quantize_fp8(torch.tensor([[1.0, wrong]]))
    with pytest.raises(TypeError, match="weight: expected floating point"):
        quantize_fp8(torch.ones(3))
    with pytest.raises(TypeError, match="scale: expected float32, got torch.bfloat16"):
        QuantizedWeight(weight.values, weight.scale.bfloat16())
    with pytest.raises(ValueError, match="scale: expected a tensor"):
        QuantizedWeight(weight.values)
    with pytest.raises(TypeError, match="weight: expected float32"):  # that is for decoding
        quantized_linear(torch.randn(3, 32), weight)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fp8_product(*operands(3, 32, 16)[:2], weight.values[:, :16], None, torch.float32)
