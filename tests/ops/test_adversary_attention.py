"""What once went wrong in attention, or would crash or mislead without a word."""

import pytest
import torch
from packed import bounds

from fastft.ops.attention import attention

HIDDEN = 8


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_keeps_a_token_from_those_that_do_not_see_it(isa, bad, window):
    """0 times NaN is NaN: the masked value must not be multiplied at all."""
    q, k, v = torch.randn(3, 70, 2, 16)
    clean = attention(q, k, v, bounds([70]), causal=True, window=window)
    for at in (1, 33, 69):
        dirty = [t.clone() for t in (q, k, v)]
        for t in dirty:
            t[at] = bad
        out = attention(*dirty, bounds([70]), causal=True, window=window)
        end = 70 if window is None else min(70, at + window)
        assert not torch.isfinite(out[at:end]).any()
        assert torch.equal(out[:at], clean[:at]) and torch.equal(out[end:], clean[end:])


def test_attention_without_query_heads():
    q = torch.randn(5, 0, HIDDEN, requires_grad=True)
    k, v = torch.randn(2, 5, 2, HIDDEN, requires_grad=True).unbind()
    out = attention(q, k, v, bounds([5]))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(g.count_nonzero() for g in grads)


def test_attention_without_head_dim():
    q = torch.randn(5, 2, 0)
    assert attention(q, q, q, bounds([5])).shape == (5, 2, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_window_as_wide_as_an_integer(causal):
    q, k, v = torch.randn(3, 9, 2, HIDDEN)
    wide = attention(q, k, v, bounds([9]), causal=causal, window=2**63 - 1)
    assert torch.equal(wide, attention(q, k, v, bounds([9]), causal=causal))


def test_attention_scores_that_overflow_to_minus_infinity(isa):
    """A first block of nothing but -inf leaves the finite scores that follow as they are."""
    q = torch.full((4, 1, HIDDEN), 1e20)
    k, v = torch.full((80, 1, HIDDEN), -1e20), torch.randn(80, 1, HIDDEN)
    k[70:] = 0
    out = attention(q, k, v, bounds([4]), bounds([80]))
    torch.testing.assert_close(out, v[70:].mean(0, keepdim=True).expand(4, 1, HIDDEN))
    assert torch.isnan(attention(q, k[:70], v[:70], bounds([4]), bounds([70]))).all()


@pytest.mark.parametrize("size", [1e4, 1e7])
def test_attention_gradients_of_large_scores_are_finite(isa, size):
    """Few queries add their scores up in another order than backward does."""
    q, k, v = (size * torch.randn(n, 1, 64) for n in (2, 50, 50))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out = attention(q, k, v, bounds([2]), bounds([50]))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))
    # No probability is above 1.
    assert dv.max() <= 2


@pytest.mark.parametrize("bad", [[0, 3, 2, 5], [1, 5], [0, 9], [0, 4], [-1, 5]])
def test_attention_refuses_bounds_even_where_nobody_looked_before(bad):
    q = torch.randn(5, 2, HIDDEN)
    for dtype in (torch.int32, torch.int64):
        cu = torch.tensor([bad, bad], dtype=dtype).t()[:, 0]
        with pytest.raises(RuntimeError, match="expected non-decreasing bounds"):
            torch.ops.fastft.attention(q, q, q, cu, cu, None, 1.0, True, -1, 0.0, 0.0)
