"""attention against scaled_dot_product_attention per sequence and a float64 truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import CASES, bounds, inputs, sides
from torch.library import opcheck
from truth import assert_as_exact, assert_same_bits_for_any_threads, leaves, run

from fastft.ops.attention import _attention, _attention_backward, attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_as_exact_as_eager(isa, dtype, options):
    for lengths, heads, kv_heads, dim in (
        ([1, 17, 130], 4, 4, 20),
        ([70, 0, 5], 6, 2, 64),
        ([300], 2, 1, 9),
        ([33, 50], 3, 1, 129),
    ):
        ours, eager = sides(lengths, **options)
        args = inputs(dtype, sum(lengths), sum(lengths), heads, kv_heads, dim)
        assert_as_exact(ours, eager, args)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_unequal_lengths(isa, options):
    lengths_q, lengths_k = [3, 60, 0, 9, 1, 80], [70, 60, 4, 2, 0, 10]
    ours, eager = sides(lengths_q, lengths_k, **options)
    args = inputs(torch.float32, sum(lengths_q), sum(lengths_k), 4, 2, 24)
    assert_as_exact(ours, eager, args)
    wide = [a.detach().double().requires_grad_() for a in args]
    grads = [torch.randn(sum(lengths_q), 4, 24).double()]
    for got, wanted in zip(*(run(f, wide, grads) for f in (ours, eager)), strict=True):
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w)


def test_rows_that_see_no_key_are_zero_with_zero_gradients(isa):
    ours, _ = sides([6], [2], causal=True)
    args = inputs(torch.float32, 6, 2, 2, 2, 8)
    (out,), (dq, dk, dv) = run(ours, args)
    assert torch.equal(out[:4], torch.zeros(4, 2, 8)) and out[4:].abs().min() > 0
    assert torch.equal(dq[:4], torch.zeros(4, 2, 8))
    assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.just(0) | st.integers(2, 90), max_size=4),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 80),
    st.sampled_from(DTYPES),
    st.sampled_from(CASES),
)
def test_any_shape(lengths, heads, dim, dtype, options):
    ours, eager = sides(lengths, **options)
    # Below three numbers per head, gradients cancel to almost nothing.
    dim = max(dim, 3)
    assert_as_exact(ours, eager, inputs(dtype, sum(lengths), sum(lengths), *heads, dim))


def test_length_one(isa):
    """out is v, and the gradients of q and k are 0, which the kernel meets but for rounding."""
    q, k, v = inputs(torch.float32, 5, 5, 2, 2, 40)
    dout = torch.randn(5, 2, 40)
    for causal in (False, True):
        (out,), (dq, dk, dv) = run(
            lambda q, k, v, c=causal: attention(q, k, v, bounds([1] * 5), causal=c),
            (q, k, v),
            [dout],
        )
        assert torch.equal(out, v)
        torch.testing.assert_close(dv, dout)
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    ours, eager = sides([20, 13], causal=True)
    fused = torch.randn(33, 3, 4, 16).to(dtype)
    swapped = torch.randn(4, 33, 16).to(dtype).transpose(0, 1)
    sparse = torch.randn(33, 4, 32).to(dtype)[..., ::2]
    for q, k, v in (fused.unbind(1), (swapped, sparse, fused[:, 0])):
        args = [x.detach().requires_grad_() for x in (q, k, v)]
        assert_as_exact(ours, eager, args)


def test_large_scores():
    """A softmax that subtracts no maximum, or a wrong one, overflows here."""
    ours, eager = sides([150], causal=True, scale=30.0)
    assert_as_exact(ours, eager, inputs(torch.float32, 150, 150, 2, 2, 16))


def test_one_sequence_never_reaches_another(isa):
    """Even NaN and infinity stay in their own sequence."""
    cu = bounds([30, 41, 20])
    args = inputs(torch.float32, 91, 91, 4, 2, 16)
    dout = torch.randn(91, 4, 16)

    def bits(args, dout):
        return run(lambda q, k, v: attention(q, k, v, cu, causal=True), args, [dout])

    before = bits(args, dout)
    for bad in (7.0, torch.inf, torch.nan):
        changed, changed_dout = leaves(args), dout.clone()
        for x in (*changed, changed_dout):
            x.data[30:71] = bad
        after = bits(changed, changed_dout)
        for x, y in zip((*before[0], *before[1]), (*after[0], *after[1]), strict=True):
            assert torch.equal(x[:30], y[:30]) and torch.equal(x[71:], y[71:])
            assert not torch.equal(x[30:71], y[30:71])
    # Causal: what comes later in the sequence is not seen.
    changed = leaves(args)
    for x in changed:
        x.data[60:71] = 7.0
    assert torch.equal(before[0][0][:60], bits(changed, dout)[0][0][:60])


def test_nan_is_not_hidden(isa):
    args = inputs(torch.float32, 40, 40, 1, 1, 16)
    args[0].data[3] = torch.nan
    out = attention(*args, bounds([40]))
    assert out[3].isnan().all() and not out[4].isnan().any()


def test_same_bits_for_any_thread_count():
    cu, args = bounds([90, 300, 13]), inputs(torch.float32, 403, 403, 6, 2, 40)

    def bits():
        out = attention(*args, cu, causal=True, dropout=0.1, seed=3)
        return out, *torch.autograd.grad((out * out).sum(), args)

    assert_same_bits_for_any_threads(bits)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradcheck_of_the_reference(options, dropout):
    cu_q, cu_k = bounds([3, 0, 4]), bounds([4, 1, 2])
    args = [x.detach().double().requires_grad_() for x in inputs(torch.float32, 7, 7, 4, 2, 3)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, cu_q, cu_k, dropout=dropout, seed=5, **options), args
    )


def test_computes_no_gradient_nobody_needs():
    q, k, v = inputs(torch.float32, 20, 20, 4, 2, 16)
    cu = bounds([20])
    options = (cu, cu, None, 0.25, True, -1, 0.0, 0.0)
    out, lse = _attention.op(q.detach(), k.detach(), v.detach(), *options)
    tensors = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse)]
    every = _attention_backward.op(*tensors, *options, True, True, True)
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        some = _attention_backward.op(*tensors, *options, *needed)
        for need, one, full in zip(needed, some, every, strict=True):
            assert torch.equal(one, full) if need else one.numel() == 0


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 9, "softcap": 2.0}], ids=str)
def test_opcheck(options):
    cu, (q, k, v) = bounds([11, 0, 20]), inputs(torch.float32, 31, 31, 4, 2, 12)
    rest = (cu, cu.clone(), torch.tensor(3), 0.3, True, options.get("window", -1))
    rest = (*rest, options.get("softcap", 0.0), 0.2 if options else 0.0)
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = _attention.op(q, k, v, *rest)
    opcheck(_attention.op, (q, k, v, *rest))
    opcheck(_attention_backward.op, (out, q, k, v, out, lse, *rest, True, True, True))
    opcheck(_attention_backward.op, (out, q, k, v, out, lse, *rest, False, True, False))


def test_compiles_in_one_graph():
    cu, args = bounds([8, 12]), inputs(torch.float32, 20, 20, 4, 2, 16)

    def fused(q, k, v):
        return attention(q, k, v, cu, causal=True, dropout=0.2, seed=7)

    assert_as_exact(torch.compile(fused, fullgraph=True), fused, args)
    drawn = torch.compile(lambda *a: attention(*a, cu, dropout=0.5), fullgraph=True)
    torch.manual_seed(1)
    first = drawn(*args)
    assert not torch.equal(first, drawn(*args))


def test_autocast_computes_in_its_dtype():
    cu, (q, k, v) = bounds([20]), inputs(torch.float32, 20, 20, 2, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k.bfloat16(), v, cu)
        assert attention(q.double(), k.double(), v.double(), cu).dtype is torch.float64
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.dtype is torch.float32


def test_errors_name_the_argument():
    q, k, v = inputs(torch.float32, 10, 10, 4, 2, 8)
    cu = bounds([10])
    for args, options, error, match in (
        ((q[0], k, v, cu), {}, ValueError, "query: expected shape"),
        ((q, k.half(), v, cu), {}, TypeError, "key: expected torch.float32"),
        ((q.long(), k, v, cu), {}, TypeError, "query: expected a floating-point"),
        ((q[:, :3], k, v, cu), {}, ValueError, "key: expected .*divisor of 3"),
        ((q, k, v[..., :4], cu), {}, ValueError, "value: expected shape"),
        ((q, k, v, cu.float()), {}, TypeError, "cu_seqlens_q: expected a vector of int"),
        ((q, k, v, bounds([9])), {}, ValueError, "cu_seqlens_q: expected non-decreasing"),
        ((q, k, v, torch.tensor([0, 12, 10])), {}, ValueError, "cu_seqlens_q: expected non"),
        ((q, k, v, cu[:0]), {}, ValueError, "cu_seqlens_q: expected at least one"),
        ((q, k, v, cu, bounds([5, 5])), {}, ValueError, "cu_seqlens_k: expected 2 entries"),
        ((q, k[:9], v[:9], cu), {}, ValueError, "cu_seqlens_k: expected bounds for 9"),
        ((q, k, v, cu), {"window": 0}, ValueError, "window: expected"),
        ((q, k, v, cu), {"softcap": 0.0}, ValueError, "softcap: expected"),
        ((q, k, v, cu), {"dropout": 1.0}, ValueError, "dropout: expected"),
    ):
        with pytest.raises(error, match=match):
            attention(*args, **options)
