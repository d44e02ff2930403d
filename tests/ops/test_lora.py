"""lora, lora_shared and lora_onto against PEFT's formula in eager and a float64 truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import dropout, linear
from truth import assert_as_exact, assert_same_bits_for_any_threads

from fastft.ops.lora import (
    LoraLinear,
    _lora,
    _lora_backward_adapters,
    _lora_backward_input,
    lora,
    lora_shared,
)
from fastft.ops.lora_onto import lora_onto
from fastft.ops.low_rank import _low_rank_add_, _low_rank_dot, _low_rank_sum

# PEFT keeps float32 adapters on a half-precision base.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SCALE = 1.7


def make(*sizes, dtype=torch.float32, std=1.0, grad=True):
    return (torch.randn(*sizes) * std).to(dtype).requires_grad_(grad)


def adapter(rank, inputs, outputs, dtype, transposed=False):
    sizes = (inputs, outputs) if transposed else (outputs, inputs)
    return (
        make(*sizes, dtype=dtype[0], std=0.1, grad=False),
        make(outputs, dtype=dtype[0]),
        make(rank, inputs, dtype=dtype[1], std=0.1),
        make(outputs, rank, dtype=dtype[1], std=0.1),
    )


def eager(x, weight, bias, a, b, transposed=False):
    """peft.tuners.lora.Linear.forward."""
    y = linear(x, weight.t() if transposed else weight, bias)
    return (y + linear(linear(x.to(a.dtype), a), b) * SCALE).to(y.dtype)


def fused(x, weight, bias, a, b, transposed=False):
    return lora(x, LoraLinear(weight, bias, a, b, SCALE, transposed=transposed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_as_exact_as_peft(isa, dtype, transposed):
    # The last of more rows than are added up in one run.
    sizes = (1, 13, 15, 1), (7, 65, 33, 3), (130, 100, 97, 8), (600, 70, 45, 43)
    for tokens, inputs, outputs, rank in sizes:
        x = make(tokens, inputs, dtype=dtype[0])
        args = adapter(rank, inputs, outputs, dtype, transposed)
        assert_as_exact(fused, eager, (x, *args, transposed))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 70), st.integers(9, 90), st.integers(9, 90), st.integers(1, 20),
    st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_any_shape(tokens, inputs, outputs, rank, dtype, bias):
    weight, b0, a, b = adapter(rank, inputs, outputs, dtype)
    x = make(tokens, inputs, dtype=dtype[0])
    assert_as_exact(fused, eager, (x, weight, b0 if bias else None, a, b))


def test_large_products_take_the_fast_library_and_stay_exact():
    x = make(200, 300)
    assert_as_exact(fused, eager, (x, *adapter(8, 300, 250, DTYPES[0])))
    assert_as_exact(fused, eager, (x, *adapter(96, 300, 250, DTYPES[0])))


@pytest.mark.parametrize("trainable", [(True, False), (False, True), (True, True)])
def test_gradients_of_a_trained_base(trainable):
    weight, bias, a, b = adapter(4, 20, 30, DTYPES[0])
    weight.requires_grad_(trainable[0])
    bias.requires_grad_(trainable[1])
    assert_as_exact(fused, eager, (make(11, 20), weight, bias, a, b))
    wt = weight.detach().t().contiguous().requires_grad_(trainable[0])
    assert_as_exact(fused, eager, (make(11, 20), wt, bias, a, b, True))


def test_no_gradient_that_nobody_needs(monkeypatch):
    """Neither dx = dy W nor dW = dy^T x is computed; what is left is as exact."""
    weight, bias, a, b = adapter(4, 20, 30, DTYPES[0])
    args = make(5, 20, grad=False), weight, bias, a.requires_grad_(False), b
    assert_as_exact(fused, eager, args)
    y = fused(*args)
    monkeypatch.setattr("fastft.ops.lora.base_input_gradient", None)
    monkeypatch.setattr("fastft.ops.lora.gemm", None)
    y.sum().backward()
    assert bias.grad is not None and b.grad is not None


@pytest.mark.parametrize("shape", ["slice", "transpose", "columns", "three"])
def test_strided_inputs(shape):
    base = torch.randn(12, 14, 40)
    x = {
        "slice": base[::2, 0],
        "transpose": base[0].t(),
        "columns": base[0, :, ::2],
        "three": base.transpose(0, 1),
    }[shape]
    args = adapter(3, x.shape[-1], 21, DTYPES[0])
    assert_as_exact(fused, eager, (x.detach().requires_grad_(), *args))


def split(tensors):
    return [tensors[i : i + 4] for i in range(0, len(tensors), 4)]


def eager_shared(x, *tensors):
    return tuple(
        eager(x, *four) if four[2] is not None else linear(x, *four[:2]) for four in split(tensors)
    )


def fused_shared(x, *tensors):
    return lora_shared(x, [LoraLinear(w, bi, a, b, SCALE) for w, bi, a, b in split(tensors)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_linears_on_one_input(dtype):
    x = make(2, 17, 48, dtype=dtype[0])
    query, key, value = (adapter(r, 48, n, dtype) for r, n in ((8, 40), (2, 10), (5, 10)))
    assert_as_exact(fused_shared, eager_shared, (x, *query, *key, *value))
    plain = (*key[:2], None, None)
    assert_as_exact(fused_shared, eager_shared, (x, *query, *plain, *value))
    assert_as_exact(fused_shared, eager_shared, (x, *plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_draws_pefts_mask(isa, dtype):
    weight, bias, a, b = adapter(11, 70, 20, dtype)

    def eager_dropped(x, *tensors):
        torch.manual_seed(5)
        w, b0, a, b = tensors
        y = linear(x, w, b0)
        return (y + linear(linear(dropout(x.to(a.dtype), 0.3), a), b) * SCALE).to(y.dtype)

    def fused_dropped(x, *tensors):
        torch.manual_seed(5)
        w, b0, a, b = tensors
        return lora(x, LoraLinear(w, b0, a, b, SCALE, dropout=0.3))

    assert_as_exact(
        fused_dropped, eager_dropped, (make(300, 70, dtype=dtype[0]), weight, bias, a, b)
    )


def test_dropout_masks_differ_per_linear_and_all_dropped_is_the_base():
    x = make(50, 32)
    weight, bias, a, b = adapter(4, 32, 8, DTYPES[0])
    same = LoraLinear(weight, bias, a, b, SCALE, dropout=0.5)
    first, second = lora_shared(x, (same, same))
    assert not torch.equal(first, second)
    gone = LoraLinear(weight, bias, a, b, SCALE, dropout=1.0)
    torch.testing.assert_close(lora(x, gone), linear(x, weight, bias))


def test_onto_a_base_product_made_elsewhere():
    x, y = make(3, 9, 30), make(3, 9, 14)
    _, _, a, b = adapter(4, 30, 14, DTYPES[0])

    def ours(y, x, a, b):
        return lora_onto(y, x, LoraLinear(None, None, a, b, SCALE))

    def theirs(y, x, a, b):
        return y + linear(linear(x, a), b) * SCALE

    kept = y.detach().clone()
    assert_as_exact(ours, theirs, (y, x, a, b))
    assert torch.equal(y.detach(), kept)
    assert ours(y, x, None, None) is y


def test_gradcheck_of_the_reference():
    def double(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)

    x, w, bias, a, b = double(4, 5), double(6, 5), double(6), double(2, 5), double(6, 2)
    assert torch.autograd.gradcheck(fused, (x, w, bias, a, b))

    def dropped(x, a, b):
        torch.manual_seed(1)
        return lora(x, LoraLinear(w.detach(), None, a, b, SCALE, dropout=0.4))

    assert torch.autograd.gradcheck(dropped, (x, a, b))


def test_same_bits_for_any_thread_count():
    x, args = make(301, 64), adapter(8, 64, 96, DTYPES[0])

    def bits():
        narrow = _low_rank_dot(x.detach(), args[2].detach(), None, 1.0, 1.0)
        return narrow, _low_rank_sum(x.detach(), narrow, None, 1.0, 1.0)

    assert_same_bits_for_any_threads(bits)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    x, w, bias, a, b = (torch.randn(*s) for s in ((6, 10), (12, 10), (12,), (3, 10), (12, 3)))
    mask = torch.rand(6, 10) > 0.5 if masked else None
    lists = ([w, w], [None, None], [bias, None], [a, a], [b, b], [mask, mask])
    numbers = ([1.0, 2.0], [1.0, 1.0], [False, False])
    ys, xas = _lora.op(x, *lists, *numbers)
    opcheck(_lora.op, (x, *lists, *numbers))
    weights, stored, _, a_s, b_s, masks = lists
    opcheck(_lora_backward_input.op, (ys, weights, stored, a_s, b_s, masks, *numbers, True))
    _, us = _lora_backward_input.op(ys, weights, stored, a_s, b_s, masks, *numbers, True)
    opcheck(_lora_backward_adapters.op, (x, ys, us, xas, masks, *numbers[:2]))
    opcheck(_low_rank_dot.op, (x, a, mask, 2.0, 0.5))
    opcheck(_low_rank_sum.op, (x, xas[0], mask, 2.0, 0.5))
    opcheck(_low_rank_add_.op, (x.clone(), xas[0], a, mask, 2.0, 0.5))


def test_compiles_in_one_graph():
    args = (make(8, 16), *adapter(4, 16, 12, DTYPES[0]))
    assert_as_exact(torch.compile(fused, fullgraph=True), fused, args)


def test_autocast_as_exact_as_eager():
    def autocast(function):
        def run(x, *args):
            if x.dtype is torch.float64:
                return function(x, *args)
            with torch.autocast("cpu", torch.bfloat16):
                return function(x, *args)

        return run

    args = (make(20, 48), *adapter(4, 48, 24, DTYPES[0]))
    assert_as_exact(autocast(fused), autocast(eager), args)


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    weight, bias, a, b = (t.detach() for t in adapter(3, 8, 5, DTYPES[0]))
    with pytest.raises(ValueError, match=r"linears\[0\].weight: expected 8 inputs"):
        lora(x, LoraLinear(weight[:, :7]))
    with pytest.raises(TypeError, match=r"linears\[0\].weight: expected torch.float32"):
        lora(x, LoraLinear(weight.bfloat16()))
    with pytest.raises(TypeError, match=r"linears\[0\].bias: expected floating point"):
        lora(x, LoraLinear(weight, bias.to(torch.complex64)))
    with pytest.raises(ValueError, match="expected both a and b"):
        lora(x, LoraLinear(weight, None, a))
    with pytest.raises(ValueError, match=r"expected a \(rank, 8\) and b \(5, rank\)"):
        lora(x, LoraLinear(weight, None, a, b.t()))
    with pytest.raises(ValueError, match="dropout: expected 0 to 1"):
        lora(x, LoraLinear(weight, None, a, b, dropout=1.5))
    with pytest.raises(ValueError, match="linears: expected at least one"):
        lora_shared(x, ())
    with pytest.raises(ValueError, match="y: expected"):
        lora_onto(torch.randn(2, 4), x, LoraLinear(None, None, a, b))
