"""linear: values and gradients where the faster library takes over, and PyTorch's own elsewhere."""

import pytest
import torch
from truth import assert_as_exact

from fastft.ops import gemm
from fastft.ops.linear import _linear, _linear_backward, linear

F = torch.nn.functional
# Around and above the size from which products go to oneDNN, where there is a choice.
SHAPES = [((40, 96), 64), ((5, 57, 130), 190), ((512, 257), 129), ((9, 2048), 700), ((0, 64), 32)]


@pytest.fixture(params=[True, False], ids=["onednn", "default"])
def library(request, monkeypatch):
    """Both libraries, whatever this processor prefers."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(gemm, "_ONEDNN", request.param)


def inputs(shape, out, bias=True):
    x = torch.randn(shape, requires_grad=True)
    weight = (torch.randn(out, shape[-1]) * 0.1).requires_grad_()
    return x, weight, torch.randn(out, requires_grad=True) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, out", SHAPES)
def test_values_and_gradients(library, shape, out, bias):
    assert_as_exact(linear, F.linear, inputs(shape, out, bias))


@pytest.mark.parametrize("frozen", range(3))
def test_frozen_and_strided(library, frozen):
    x, weight, bias = inputs((300, 2 * 128), 96)
    x = x.detach()[:, ::2]
    args = [x.requires_grad_(), weight[:, :128].detach().requires_grad_(), bias]
    args[frozen] = args[frozen].detach()
    assert_as_exact(linear, F.linear, args)


def test_nothing_is_computed_for_what_is_frozen(monkeypatch):
    monkeypatch.setattr(gemm, "_ONEDNN", True)
    asked = []
    real = _linear_backward.op

    def seen(dy, x, weight, needs):
        asked.append(needs)
        return real(dy, x, weight, needs)

    monkeypatch.setattr("fastft.ops.linear._linear_backward", seen)
    x, weight, bias = inputs((512, 256), 128)
    linear(x.detach(), weight, bias).sum().backward()
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert asked == [[False, True, True], [True, False, False]]
    assert weight.grad.is_contiguous()  # else autograd copies it for every layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_autocast_are_pytorchs(library, dtype):
    x, weight, bias = (t.detach().to(dtype) for t in inputs((512, 256), 128))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        x, weight, bias = (t.float() for t in (x, weight, bias))
        y = linear(x, weight, bias)
        assert y.dtype is torch.bfloat16 and torch.equal(y, F.linear(x, weight, bias))


def test_errors_are_pytorchs(library):
    x, weight, _ = (None if t is None else t.detach() for t in inputs((512, 256), 128))
    for bad in (
        (x, weight[:, :100], None),
        (x, weight, torch.randn(127)),
        (x, weight.double(), None),
    ):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*bad)
        with pytest.raises(RuntimeError) as ours:
            linear(*bad)
        assert str(ours.value) == str(theirs.value)


def test_opcheck_and_compile(library):
    x, weight, bias = (t.detach() for t in inputs((12, 40), 24))
    torch.library.opcheck(_linear.op, (x, weight, bias))
    torch.library.opcheck(_linear.op, (x, weight, None))
    dy = torch.randn(12, 24)
    torch.library.opcheck(_linear_backward.op, (dy, x, weight, [True, True, False]))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_as_exact(compiled, F.linear, inputs((512, 256), 128))
