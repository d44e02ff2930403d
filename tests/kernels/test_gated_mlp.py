"""The Triton gated_mlp, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import gated_mlp
from same import assert_same

from fastft.ops.gated_mlp import ACTIVATIONS, _gated_mlp, _gated_mlp_backward


def both(dh, gate, up, activation):
    assert_same(gated_mlp.gated_mlp, _gated_mlp, (gate, up, activation))
    for with_h in (False, True):
        args = (dh, gate, up, activation, with_h)
        assert_same(gated_mlp.gated_mlp_backward, _gated_mlp_backward, args)
        for out in gated_mlp.gated_mlp_backward(*args):
            assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 33), (2, gated_mlp.BLOCK), (1, 2500)])
def test_values(dtype, activation, shape):
    both(*((2 * torch.randn(*shape)).to(dtype) for _ in range(3)), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_of_gate(activation):
    gate = torch.linspace(-30, 30, 601)
    both(torch.ones(601), gate, torch.ones(601), activation)
    # Far from 0 the activation is 0 or the identity, to the bit.
    gate, one = torch.tensor([-1e30, -200.0, 200.0, 1e30]), torch.ones(4)
    h, dgate, dup = gated_mlp.gated_mlp_backward(one, gate, one, activation, True)
    wanted = gate.clamp(min=0)
    assert torch.equal(h, wanted) and torch.equal(dup, wanted)
    if activation == "silu":
        assert torch.equal(dgate, torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_rows_where_they_lie(monkeypatch):
    """Halves of one tensor, slices along the rows, a repeated gradient: read without a copy."""
    halves = torch.randn(2, 3, 2, 70)
    gate, up = halves.view(2, 3, 140).chunk(2, -1)
    dh = torch.randn(12, 1100)[::2, :70].view(2, 3, 70)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", None)
        gated_mlp.gated_mlp(gate, up, "silu")
        gated_mlp.gated_mlp_backward(dh, gate, up, "silu", True)
    for tensor in (gate, up, dh):
        assert gated_mlp.rows_of(tensor).data_ptr() == tensor.data_ptr()
    both(dh, gate, up, "silu")
    both(torch.randn(70).expand(2, 3, 70), gate, up, "gelu")
    wide = torch.randn(3, 2, 2300)
    both(wide[:, 1, :2200], wide[:, 0, :2200], torch.randn(3, 2200), "gelu_tanh")


def test_layouts_without_rows():
    base = torch.randn(5, 4, 6)
    both(base.permute(2, 1, 0), torch.randn(6, 4, 5), base.permute(2, 1, 0) * 2, "silu")
    both(*(torch.randn(2, 6)[:, ::2] for _ in range(3)), "gelu")
    both(*(torch.randn(4, 3)[:, :1] for _ in range(3)), "silu")


@pytest.mark.parametrize("shape", [(0,), (0, 7), (2, 0, 4), (3, 0)])
def test_nothing(shape):
    both(*(torch.randn(*shape) for _ in range(3)), "silu")
