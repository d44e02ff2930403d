"""attention against scaled_dot_product_attention per sequence and a float64 truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from transformers.masking_utils import (
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from truth import assert_as_exact, leaves, run

from fastft.ops.attention import _attention, _attention_backward, _keep, attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bounds(lengths, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(lengths, dtype=dtype).cumsum(0).tolist()], dtype=dtype)


def mask_of(length_q, length_k, causal, window):
    """(length_q, length_k), from transformers' own overlays."""
    i = torch.arange(length_q)[:, None] + length_k - length_q
    j = torch.arange(length_k)
    seen = i >= j if causal else torch.ones(length_q, length_k, dtype=torch.bool)
    if window is not None:
        overlay = sliding_window_overlay if causal else sliding_window_bidirectional_overlay
        seen = seen & overlay(window)(0, 0, i, j)
    return seen


def eager_sequence(q, k, v, seen, softcap, scale):
    """One sequence; (1, heads, tokens, head_dim). Rows that see nothing give 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)
    else:  # as transformers' Gemma 2
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, -torch.inf)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.softmax(scores, -1, dtype=wide).nan_to_num(0).to(q.dtype) @ v
    return out.masked_fill(~seen.any(-1)[:, None], 0)


def sides(lengths_q, lengths_k=None, **options):
    """(ours, eager) as functions of packed query, key, value."""
    cu_q, cu_k = bounds(lengths_q), None if lengths_k is None else bounds(lengths_k, torch.int32)
    if cu_k is not None:
        cu_q = cu_q.int()

    def ours(q, k, v):
        return attention(q, k, v, cu_q, cu_k, **options)

    def eager(q, k, v):
        starts_k = cu_q if cu_k is None else cu_k
        outs = [(q + k.sum() + v.sum())[:0]]  # connected even where every sequence is empty
        for s in range(len(lengths_q)):
            a, b, c, d = (int(x) for x in (*cu_q[s : s + 2], *starts_k[s : s + 2]))
            if a == b:
                continue
            parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            seen = mask_of(b - a, d - c, options.get("causal", False), options.get("window"))
            out = eager_sequence(*parts, seen, options.get("softcap"), options.get("scale"))
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return ours, eager


def inputs(dtype, tokens_q, tokens_k, heads, kv_heads, dim):
    def make(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    return make(tokens_q, heads, dim), make(tokens_k, kv_heads, dim), make(tokens_k, kv_heads, dim)


CASES = [
    {},
    {"causal": True},
    {"causal": True, "window": 5},
    {"window": 70},
    {"causal": True, "window": 100, "softcap": 3.0},
    {"softcap": 0.7, "scale": 0.3},
    {"causal": True, "scale": -0.2},
]


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
        assert torch.equal(out, v) and torch.equal(dv, dout)
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

    two = bits()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = bits()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def dropout_from(keep, dropout):
    """Attention over one sequence with a given mask of what is kept."""

    def eager(q, k, v):
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        p = torch.softmax(scores, -1, dtype=wide) * keep / (1 - dropout)
        return torch.einsum("hqk,khd->qhd", p.to(q.dtype), v)

    return eager


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, -5, 2**40 + 17])
def test_kernel_drops_what_the_reference_drops(isa, dtype, seed):
    keep = _keep(torch.tensor(seed), 3, 100, 100, 0.3)
    args = inputs(dtype, 100, 100, 3, 3, 24)
    cu = bounds([100])
    assert_as_exact(
        lambda q, k, v: attention(q, k, v, cu, dropout=0.3, seed=seed),
        dropout_from(keep, 0.3),
        args,
    )


def test_mask_statistics():
    """Every pair of rows, heads and seeds is as good as independent, and the rate is right."""
    masks = torch.stack([_keep(torch.tensor(s), 4, 64, 1024, 0.25) for s in (0, 1, 2**32)])
    rows = masks.flatten(0, 2).double()  # (768, 1024)
    assert abs(rows.mean() - 0.75) < 5 * (0.1875 / rows.numel()) ** 0.5
    # Means of rows and of columns have the spread of independent draws.
    assert abs(rows.mean(1).std() / (0.1875 / rows.shape[1]) ** 0.5 - 1) < 0.15
    assert abs(rows.mean(0).std() / (0.1875 / rows.shape[0]) ** 0.5 - 1) < 0.15
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / rows.shape[1] ** 0.5
    neighbours = torch.corrcoef(rows.t()) - torch.eye(rows.shape[1])
    assert neighbours.abs().max() < 6 / rows.shape[0] ** 0.5


def test_expected_value_of_dropout():
    args = inputs(torch.float32, 12, 12, 2, 2, 8)
    cu, plain = bounds([12]), attention(*args, bounds([12]))
    draws = torch.stack([attention(*args, cu, dropout=0.2, seed=s) for s in range(3000)])
    error = (draws.mean(0) - plain) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 5
    assert draws.std(0).min() > 0


def test_seed_and_generator():
    args, cu = inputs(torch.float32, 30, 30, 2, 2, 8), bounds([30])

    def with_(**options):
        return attention(*args, cu, dropout=0.5, **options)

    assert torch.equal(with_(seed=1), with_(seed=1))
    assert not torch.equal(with_(seed=1), with_(seed=2))
    torch.manual_seed(4)
    first, second = with_(), with_()
    torch.manual_seed(4)
    assert torch.equal(first, with_()) and torch.equal(second, with_())
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    with_(seed=1), attention(*args, cu)
    assert torch.equal(state, torch.get_rng_state())


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
