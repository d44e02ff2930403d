"""The Triton rotary, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import rotary
from same import assert_same

from fastft.ops.rotary import _rotary, _rotary_backward


def same_layout(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert g.stride() == w.stride()


def both(q, k, cos, sin, axis):
    args = (q, k, cos, sin, axis)
    assert_same(rotary.rotary, _rotary, args)
    same_layout(rotary.rotary(*args), _rotary.reference(*args))
    for other, swapped in ((k, False), (k, True), (None, False), (None, True)):
        args = (q, other, cos, sin, axis, swapped)
        assert_same(rotary.rotary_backward, _rotary_backward, args)
        same_layout(rotary.rotary_backward(*args), _rotary_backward.reference(*args))


def angles(batch, tokens, rotary_dim, dtype=torch.float32):
    # Unequal halves, and no circle: every one of the four tables counts.
    return (torch.randn(batch, tokens, rotary_dim).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(2, 3, 4, 2, 8, 8), (1, 1, 1, 1, 2, 2), (2, 2, 3, 1, 20, 12), (1, 2, 5, 5, 10, 0)],
)
def test_values(dtype, axis, batch, tokens, heads, kv_heads, head_dim, rotary_dim):
    for swap in (False, True):
        shapes = [
            (batch, n, tokens, head_dim) if (axis == 1) != swap else (batch, tokens, n, head_dim)
            for n in (heads, kv_heads)
        ]
        q, k = (torch.randn(*shape).to(dtype) for shape in shapes)
        if swap:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        both(q, k, *angles(batch, tokens, rotary_dim, dtype), axis)


def test_more_heads_than_one_program_takes():
    rotary_dim = 2 * rotary.TILE // 4
    q, k = torch.randn(1, 9, 2, rotary_dim + 3), torch.randn(1, 6, 2, rotary_dim + 3)
    both(q, k, *angles(1, 2, rotary_dim), 1)


def test_distances_and_types():
    """q and k as slices of one projection, shared angles in float32, gradients that repeat."""
    packed = torch.randn(2, 3, 6 * 8).half().view(2, 3, 6, 8)
    q, k = packed[:, :, :3].transpose(1, 2), packed[:, :, 3:5].transpose(1, 2)
    cos, sin = angles(1, 3, 8)
    both(q, k, cos, sin, 1)
    both(q, k, cos.expand(2, 3, 8), sin[:, :, :].half(), 1)
    both(q, k, torch.randn(2, 6, 16)[:, ::2, :8], torch.randn(1, 3, 16)[..., ::2], 1)
    both(torch.randn(1, 1, 3, 1).half().expand(2, 4, 3, 8), k.contiguous(), cos, sin, 1)
    both(torch.randn(2, 4, 8, 3).half().transpose(2, 3), k, cos, sin, 1)


def test_one_order_each():
    q, k = torch.randn(2, 4, 3, 6), torch.randn(2, 3, 2, 6).transpose(1, 2)
    both(q, k, *angles(2, 3, 6), 1)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing(shape):
    q, k = torch.randn(*shape), torch.randn(shape[0], 1, *shape[2:])
    both(q, k, *angles(shape[0], shape[2], shape[3]), 1)
