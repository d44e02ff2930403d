"""gated_mlp against PyTorch eager and a float64 truth: values, gradients, layouts, errors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from truth import assert_as_exact, assert_same_bits_for_any_threads

from fastft.ops.gated_mlp import ACTIVATIONS, _gated_mlp, _gated_mlp_backward, gated_mlp


@pytest.fixture(autouse=True)
def _kernels_at_any_size(monkeypatch):
    """Small inputs, as most here are, would go to PyTorch's own operators."""
    monkeypatch.setattr("fastft.ops.gated_mlp._EAGER_SIZES", {})


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EAGER = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def eager(gate, up, activation):
    return EAGER[activation](gate) * up


def inputs(dtype, *shape):
    # Wide enough for every branch of the elementary functions.
    return [(4 * torch.randn(*shape)).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_exact_as_eager(isa, dtype, activation):
    for shape in [(1,), (9,), (3, 17), (2, 5, 64), (33, 100), (4, 4097), (40, 577)]:
        assert_as_exact(gated_mlp, eager, (*inputs(dtype, *shape), activation))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 200),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTIVATIONS),
)
def test_any_shape(rows, columns, dtype, activation):
    assert_as_exact(gated_mlp, eager, (*inputs(dtype, *rows, columns), activation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(isa, dtype):
    both = (4 * torch.randn(3, 6, 100)).to(dtype)
    gate, up = both.chunk(2, -1)
    other = torch.randn(3, 6, 50).to(dtype)
    for views in (
        (gate, up),
        (gate[:, ::2], other[:, ::2]),
        (gate.transpose(0, 1), up.transpose(0, 1)),
        (gate[..., ::3], up[..., ::3]),
        (gate[:, :1], other[:, :1]),
        (gate.transpose(0, 2), other.transpose(0, 2)),
    ):
        leaves = [v.detach().requires_grad_() for v in views]
        assert_as_exact(gated_mlp, eager, (*leaves, "silu"))
    # Shared memory cannot be copied stride by stride, so this layout is compared with a dense one.
    shared = gate[:1].expand(3, 6, 50)
    assert torch.equal(gated_mlp(shared, other), gated_mlp(shared.contiguous(), other))


def test_upstream_gradient_of_any_layout():
    gate, up = inputs(torch.float32, 6, 40)
    for dh in (torch.randn(40, 6).t(), torch.randn(1, 1).expand(6, 40), torch.randn(6, 80)[:, 40:]):
        got = torch.autograd.grad(gated_mlp(gate, up), (gate, up), dh)
        wanted = torch.autograd.grad(eager(gate, up, "silu"), (gate, up), dh)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gradient_that_nobody_needs(activation):
    gate, up = inputs(torch.float32, 5, 33)
    assert_as_exact(gated_mlp, eager, (gate.detach(), up, activation))
    assert_as_exact(gated_mlp, eager, (gate, up.detach(), activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_gives_the_forward_again(isa, dtype, activation):
    gate, up = (x.detach() for x in inputs(dtype, 7, 131))
    dh = torch.randn(7, 131).to(dtype)
    h, dgate, dup = _gated_mlp_backward(dh, gate, up, activation, True)
    torch.testing.assert_close(h, _gated_mlp(gate, up, activation), rtol=1e-6, atol=1e-6)
    nothing, *same = _gated_mlp_backward(dh, gate, up, activation, False)
    assert nothing.shape == (0,)
    assert torch.equal(dgate, same[0]) and torch.equal(dup, same[1])


def grid() -> torch.Tensor:
    """Float32 from -30 to 30: even steps, every magnitude down to the subnormal, and the branches'
    ends with their neighbours."""
    steps = torch.linspace(-30, 30, 120_001)
    magnitudes = torch.logspace(-45, 1.477, 20_000, base=10.0, dtype=torch.float64).float()
    edges = torch.tensor([0.0, 0.625, 1.0, 2.0, 2**0.5, 8**0.5, 0.34657, 9.0, 10.0])
    edges = torch.cat([edges, edges.nextafter(torch.tensor(99.0)), edges.nextafter(-edges)])
    return torch.cat([steps, magnitudes, -magnitudes, edges, -edges])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_elementary_functions_element_by_element(isa, activation):
    """act(x) = x w(x) with w from exp, tanh or erf: w and act' within 6 ulp of 1 (their range)."""
    x = grid()
    gate = x.double().requires_grad_()
    truth = EAGER[activation](gate)
    (slope,) = torch.autograd.grad(truth.sum(), gate)
    ones = torch.ones_like(x)
    h, dgate, dup = _gated_mlp_backward(ones, x, ones, activation, True)
    assert torch.equal(h, dup)
    eps = torch.finfo(torch.float32).eps
    smallest = 2.0**-149  # a product of subnormal size is rounded to a multiple of this
    for got in (h, _gated_mlp(x, ones, activation)):
        error = (got.double() - truth).abs() - smallest
        assert (error <= 2 * eps * x.double().abs()).all()
        # Where x > 0 nothing cancels, so w is exact in the relative sense too.
        assert (error <= 4 * eps * truth.abs())[x > 0].all()
    # The derivative's terms grow with |x|, and cancel where it comes near zero.
    assert ((dgate.double() - slope).abs() <= 6 * eps * (1 + x.double().abs())).all()


TAILS = {
    # Where act(x) is far above the subnormal range, and act in a form that does not cancel there.
    "silu": (-80, lambda x: x * torch.sigmoid(x)),
    "gelu": (-12, lambda x: 0.5 * x * torch.special.erfc(-x * 0.5**0.5)),
    "gelu_tanh": (-9, lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tails_keep_their_relative_precision(isa, activation):
    """Far below zero e^y decides; an error relative to 1 would lose every digit there."""
    lowest, exact = TAILS[activation]
    x = torch.linspace(lowest, 0, 40_001)
    truth = exact(x.double())
    got = _gated_mlp(x, torch.ones_like(x), activation).double()
    # y itself is rounded once per operation, and each rounding moves e^y by up to |y| half-ulps.
    y = x.double().abs() if activation == "silu" else 0.5 * x.double().square()
    y = 2 * y if activation == "gelu_tanh" else y
    eps = torch.finfo(torch.float32).eps
    assert ((got - truth).abs() <= (6 + 2 * y) * eps * truth.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinity_and_nan_as_eager_in_float64(isa, activation):
    """In float32 eager's own gelu gives NaN for infinity, and infinity for 3e38."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e4, -1e4, -0.0])
    up = torch.ones_like(x)
    for gate in (x, x.repeat(40)):
        got = _gated_mlp(gate, torch.ones_like(gate), activation)
        wanted = eager(gate.double(), 1.0, activation).float()
        torch.testing.assert_close(got, wanted, equal_nan=True)
    finite = x[5:].requires_grad_()
    (slope,) = torch.autograd.grad(gated_mlp(finite, up[5:], activation).sum(), finite)
    torch.testing.assert_close(slope, torch.tensor([1.0, 0.0, 0.5]))
    assert gated_mlp(x[2:3], up[2:3], activation).isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    gate, up = inputs(torch.float64, 4, 6)
    assert torch.autograd.gradcheck(partial(gated_mlp, activation=activation), (gate, up))


def test_same_bits_for_any_thread_count():
    gate, up = inputs(torch.float32, 31, 1030)

    def bits():
        h = gated_mlp(gate, up)
        return h, *torch.autograd.grad(h.square().sum(), (gate, up))

    assert_same_bits_for_any_threads(bits)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    gate, up = torch.randn(2, 5, 40).chunk(2, -1)
    opcheck(_gated_mlp.op, (gate, up, activation))
    for with_h in (False, True):
        opcheck(_gated_mlp_backward.op, (torch.randn(2, 5, 20), gate, up, activation, with_h))


def test_compiles_in_one_graph():
    compiled = torch.compile(gated_mlp, fullgraph=True)
    assert_as_exact(compiled, eager, (*inputs(torch.float32, 8, 40), "gelu"))


def test_autocast_leaves_the_dtype():
    gate, up = inputs(torch.float32, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        h = gated_mlp(gate, up)
    torch.testing.assert_close(h, eager(gate, up, "silu"))


def test_errors_name_the_argument():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="activation: expected one of"):
        gated_mlp(x, x, "relu")
    with pytest.raises(ValueError, match="up: expected shape"):
        gated_mlp(x, torch.randn(2, 7))
    with pytest.raises(TypeError, match="up: expected torch.float32"):
        gated_mlp(x, x.double())
    with pytest.raises(TypeError, match="gate: expected a floating-point"):
        gated_mlp(x.long(), x.long())
    with pytest.raises(ValueError, match="gate: expected at least one dimension"):
        gated_mlp(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="activation: expected silu, gelu or gelu_tanh"):
        _gated_mlp(x, x, "relu")
