"""What once went wrong, or would crash or mislead without a word: one test per way, by operator."""

import threading

import pytest
import torch
import torch.nn.functional as F
from packed import bounds

from fastft.ops.attention import attention
from fastft.ops.cross_entropy import cross_entropy
from fastft.ops.gated_mlp import gated_mlp
from fastft.ops.linear import linear as linear_product
from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy
from fastft.ops.lora import LoraLinear, lora, lora_shared
from fastft.ops.lora_mlp import lora_mlp
from fastft.ops.lora_onto import lora_onto
from fastft.ops.norm import layer_norm, rms_norm
from fastft.ops.rotary import rotary

HIDDEN = 8


@pytest.fixture(autouse=True)
def _kernels_at_any_size(monkeypatch):
    """Small inputs, as all here are, would go to PyTorch's own operators."""
    monkeypatch.setattr("fastft.ops.norm._EAGER_BELOW", 0)
    monkeypatch.setattr("fastft.ops.gated_mlp._EAGER_SIZES", {})
    monkeypatch.setattr("fastft.ops.linear._wins", lambda *_: True)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def linear(out=HIDDEN, rank=2):
    return LoraLinear(torch.randn(out, HIDDEN), None, leaf(rank, HIDDEN), leaf(out, rank))


def cases() -> dict:
    """Every operator as a function of one x of shape (4, HIDDEN), which it takes once or twice."""
    weight, angles, adapter = leaf(HIDDEN), torch.randn(1, 4, HIDDEN), linear()
    labels, cu = torch.tensor([1, 0, -100, 2]), bounds([4])
    return {
        "rms_norm": lambda x: rms_norm(x, weight),
        "rms_norm, itself added": lambda x: rms_norm(x, weight, residual=x),
        "layer_norm": lambda x: layer_norm(x, weight),
        "gated_mlp": lambda x: gated_mlp(x, x),
        "rotary": lambda x: rotary(*[x.view(1, 1, 4, HIDDEN)] * 2, angles, angles),
        "linear": lambda x: linear_product(x, weight.diag()),
        "lora": lambda x: lora(x, adapter),
        "lora_shared": lambda x: lora_shared(x, (adapter, adapter)),
        "lora_mlp": lambda x: lora_mlp(x, adapter, adapter, adapter),
        "lora_onto": lambda x: lora_onto(x, x, adapter),
        "cross_entropy": lambda x: cross_entropy(x, labels),
        "linear_cross_entropy": lambda x: linear_cross_entropy(x, Head(x), labels),
        "losses": lambda x: linear_cross_entropy(x, Head(x), labels, reduction="none"),
        "attention": lambda x: attention(*[x.view(4, 1, HIDDEN)] * 3, cu, cu, causal=True),
    }


NAMES = list(cases())


def total(out) -> torch.Tensor:
    outs = out if isinstance(out, tuple) else (out,)
    return sum((o.float() * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outs)


# ---- every operator ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name):
    """Backward passes are kernels without derivatives: theirs would lack terms, in silence."""
    x = leaf(4, HIDDEN)
    # The upstream gradient is a constant, or depends on x itself.
    for loss in (total(cases()[name](x)), total(cases()[name](x)) ** 2):
        with pytest.raises(RuntimeError, match=r"^\w+: .* first derivatives only"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_transforms_are_refused(name):
    function, x = cases()[name], torch.randn(4, HIDDEN)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(lambda x: total(function(x)), (x,), (torch.ones_like(x),))
    no_jvp = pytest.raises(RuntimeError, match="implement the jvp function")
    with torch.autograd.forward_ad.dual_level(), torch.no_grad(), no_jvp:
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: total(function(x)))(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_and_a_broadcast_upstream_gradient(name):
    """`.sum()` sends back one number with strides of 0; a graph that is kept gives the same."""
    x, function = leaf(4, HIDDEN), cases()[name]
    before = x.detach().clone()
    out = function(x)
    outs = _tuple(out)
    loss = sum(o.sum() for o in outs)
    first, second, third = (
        torch.autograd.grad(loss, x, retain_graph=kept)[0] for kept in (True, True, False)
    )
    assert torch.equal(first, second) and torch.equal(first, third)
    dense = [torch.ones_like(o).contiguous() for o in outs]
    assert torch.equal(first, torch.autograd.grad(_tuple(function(x)), x, dense)[0])
    assert torch.equal(x, before)


def _tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", NAMES)
def test_an_input_changed_before_backward_gives_no_wrong_gradient(name):
    base, function = leaf(4, HIDDEN), cases()[name]
    (wanted,) = torch.autograd.grad(total(function(base * 1)), base)
    x = base * 1
    loss = total(function(x))
    with torch.no_grad():
        x.mul_(2)
    try:
        (got,) = torch.autograd.grad(loss, base)
    except RuntimeError as refused:
        assert "modified by an inplace operation" in str(refused)
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_one_tensor_in_two_places(name):
    x, function = leaf(4, HIDDEN), cases()[name]
    outs = []
    for each in (function, torch.compile(function, fullgraph=True)):
        out = _tuple(each(x))
        with torch.no_grad():
            plain = _tuple(each(x))
        outs.append([*out, *plain, *torch.autograd.grad(total(out), x)])
    for eager, compiled in zip(*outs, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_threads_share_the_operators():
    """Eight threads call everything at once, forward and backward."""
    everything, x = cases(), torch.randn(4, HIDDEN)

    def once():
        leafs = x.clone().requires_grad_()
        return [torch.autograd.grad(total(f(leafs)), leafs)[0] for f in everything.values()]

    wanted, same = once(), []

    def worker():
        for _ in range(5):
            same.append(all(torch.equal(a, b) for a, b in zip(once(), wanted, strict=True)))

    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40  # of a thread that raises, some are missing


def test_copies_of_gradients_are_not_shared():
    """x and its residual have equal gradients, which must not be one memory."""
    x, residual = leaf(4, HIDDEN), leaf(4, HIDDEN)
    rms_norm(x, residual=residual)[0].square().sum().backward()
    wanted = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, wanted) and wanted.abs().max() > 0


# ---- norm ----------------------------------------------------------------------------------------


def test_norm_backward_refuses_statistics_it_cannot_read():
    x, half = torch.randn(6, HIDDEN), torch.ones(6).bfloat16()
    with pytest.raises(RuntimeError, match="rstd: expected contiguous float32"):
        torch.ops.fastft.rms_norm_backward(x, None, x, None, half, 0.0, False)
    with pytest.raises(RuntimeError, match="mean: expected shape"):
        torch.ops.fastft.layer_norm_backward(
            x, None, x, None, torch.ones(1), torch.ones(6), False, False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_inputs_take_the_operators_that_start_sooner(monkeypatch, dtype):
    """The same bits as PyTorch's, contiguous whatever the strides, and still checked."""
    monkeypatch.undo()
    x, residual = torch.randn(2, 5, 6, HIDDEN).to(dtype).transpose(1, 2).unbind()
    weight, bias = torch.randn(2, HIDDEN).to(dtype).unbind()
    total = x + residual
    wanted = F.layer_norm(total, (HIDDEN,), weight, bias)
    y, kept = layer_norm(x, weight, bias, residual=residual)
    assert torch.equal(y, wanted) and torch.equal(kept, total)
    assert torch.equal(layer_norm(total, weight, bias), wanted)
    h = gated_mlp(x, residual)
    assert torch.equal(h, F.silu(x) * residual)
    assert all(t.is_contiguous() for t in (y, kept, h))
    wide = torch.randn(40, 1024).to(dtype)
    assert torch.equal(gated_mlp(wide, wide, "gelu"), F.gelu(wide) * wide)
    assert layer_norm(x, weight.double()).dtype is dtype
    with pytest.raises(ValueError, match="weight: expected shape"):
        layer_norm(x, weight[1:])


# ---- rotary --------------------------------------------------------------------------------------


def test_rotary_refuses_angles_that_would_be_trained():
    q, angles = leaf(1, 1, 4, HIDDEN), leaf(1, 4, HIDDEN)
    with pytest.raises(ValueError, match="cos and sin: expected tensors that need no gradient"):
        rotary(q, q, angles, angles.detach())
    with torch.no_grad():
        rotary(q, q, angles, angles)
    with pytest.raises(TypeError, match="sin: expected float32 or smaller"):
        rotary(q, q, angles.detach(), angles.detach().double())


# ---- lora ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 65])
def test_low_rank_part_is_float32_under_autocast(rank):
    """Whatever the rank; and backward may run outside the region."""
    x, y, adapter = leaf(4, HIDDEN), leaf(4, HIDDEN), linear(rank=rank)
    (wanted,) = torch.autograd.grad(lora_onto(y, x, adapter).sum(), x)
    out = lora_onto(y, x, adapter)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lora_onto(y, x, adapter)
    assert torch.equal(inside, out)
    assert torch.equal(torch.autograd.grad(inside.sum(), x)[0], wanted)


def test_lora_names_what_does_not_fit():
    x, weight, a, b = torch.randn(4, HIDDEN), leaf(6, HIDDEN), leaf(2, HIDDEN), leaf(6, 2)
    with pytest.raises(ValueError, match=r"linears\[0\].weight: expected two dimensions"):
        lora(x, LoraLinear(weight[0]))
    with pytest.raises(ValueError, match=r"linears\[0\].bias: expected shape \(6,\)"):
        lora(x, LoraLinear(weight, torch.ones(1)))
    with pytest.raises(TypeError, match=r"linears\[0\]: expected floating-point a and b"):
        lora(x, LoraLinear(weight, None, torch.ones(2, HIDDEN).long(), b))
    for wrong in ((a[:, 1:], b), (a, b[:, 1:])):
        with pytest.raises(ValueError, match="linear: expected a"):
            lora_onto(torch.randn(4, 6), x, LoraLinear(None, None, *wrong))
    with pytest.raises(ValueError, match="linear.dropout: expected 0 to 1"):
        lora_onto(torch.randn(4, 6), x, LoraLinear(None, None, a, b, 1.0, 2.0))
    with pytest.raises(ValueError, match=r"linear: expected b \(out, rank\)"):
        lora_onto(torch.randn(4, 6), x, LoraLinear(None, None, a, torch.ones(())))
    with pytest.raises(TypeError, match="expected float64 in all or none"):
        lora_onto(torch.randn(4, 6), x.double(), LoraLinear(None, None, a, b))
    with pytest.raises(ValueError, match="y: expected"):
        lora_onto(torch.ones(()), x, LoraLinear(None, None, a, b))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        lora_onto(torch.randn(4, 6), x.long(), LoraLinear(None, None, a, b))


# ---- cross entropy -------------------------------------------------------------------------------


def test_cross_entropy_refuses_class_weights_that_would_be_trained():
    with pytest.raises(ValueError, match="weight: expected a tensor that needs no gradient"):
        cross_entropy(torch.randn(4, 3), torch.zeros(4).long(), weight=leaf(3))
