"""decode_attention against eager attention per row; and its promise, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import eager_sequence, mask_of
from torch.library import opcheck
from truth import assert_as_exact, assert_same_bits_for_any_threads, same_bits

from fastft.ops.decode_attention import _decode_attention, decode_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    {},
    {"window": 5},
    {"window": 300, "softcap": 3.0},
    {"softcap": 0.7, "scale": 0.3},
    {"scale": -0.2},
]


def eager(lengths, **options):
    """Attention of every row over the slots in use, as a function of query and caches."""
    softcap, scale = options.get("softcap"), options.get("scale")

    def function(query, key, value):
        outs = []
        for row, length in enumerate(lengths):
            parts = (query[row].transpose(0, 1), key[row, :, :length], value[row, :, :length])
            seen = mask_of(query.shape[1], length, True, options.get("window"))
            out = eager_sequence(*(x[None] for x in parts), seen, softcap, scale)
            outs.append(out[0].transpose(0, 1))
        return torch.stack(outs) if outs else query.clone()

    return function


def ours(lengths, **options):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return lambda *tensors: decode_attention(*tensors, lengths, **options)


def inputs(dtype, lengths, queries, heads, kv_heads, dim, capacity=None):
    """Query and caches; the slots that are not in use hold NaN."""
    capacity = max([*lengths, 0]) + 3 if capacity is None else capacity
    query = torch.randn(len(lengths), queries, heads, dim).to(dtype)
    caches = torch.randn(2, len(lengths), kv_heads, capacity, dim).to(dtype)
    for row, length in enumerate(lengths):
        caches[:, row, :, length:] = torch.nan
    return query, *caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_as_exact_as_eager(isa, dtype, options):
    for lengths, queries, heads, kv_heads, dim in (
        ([1, 17, 600], 1, 4, 4, 20),
        ([70, 0, 256, 257], 3, 6, 2, 64),
        ([900], 16, 5, 1, 129),
        ([2, 513], 5, 9, 3, 64),
    ):
        args = inputs(dtype, lengths, queries, heads, kv_heads, dim)
        assert_as_exact(ours(lengths, **options), eager(lengths, **options), args)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 600), max_size=3),
    st.integers(0, 16),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (7, 1)]),
    st.integers(1, 80),
    st.sampled_from(DTYPES),
    st.sampled_from(CASES),
)
def test_any_shape(lengths, queries, heads, dim, dtype, options):
    args = inputs(dtype, lengths, queries, *heads, dim)
    assert_as_exact(ours(lengths, **options), eager(lengths, **options), args)


# Work enough for both threads: three key heads leave blocks to share out, nine rows of them do not.
LENGTHS = [1300, 3, 257, 1024, 0, 700, 255, 801, 12]
PROMISED = [{}, {"window": 270}, {"window": 3, "softcap": 2.0}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", PROMISED, ids=str)
def test_bits_of_a_query_depend_on_nothing_beside_it(isa, dtype, options):
    for queries, heads, dim in ((16, 9, 64), (7, 6, 40)):
        query, key, value = inputs(dtype, LENGTHS, queries, heads, 3, dim)
        together = ours(LENGTHS, **options)(query, key, value)
        for row, length in enumerate(LENGTHS):
            alone = ours([length], **options)(*(x[row : row + 1] for x in (query, key, value)))
            assert same_bits(alone[0], together[row])
            for i in range(queries):
                position = max(length - queries + i + 1, 0)
                one = query[row : row + 1, i : i + 1]
                alone = ours([position], **options)(one, key[row : row + 1], value[row : row + 1])
                assert same_bits(alone[0, 0], together[row, i]), (row, i)
    for head in range(3):  # one key head alone, with the heads that read it
        mine = slice(2 * head, 2 * head + 2)
        part = query[:, :, mine], key[:, head : head + 1], value[:, head : head + 1]
        assert same_bits(ours(LENGTHS, **options)(*part), together[:, :, mine])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_capacity_or_strides(isa, dtype):
    query, key, value = inputs(dtype, LENGTHS, 4, 6, 2, 48)
    wanted = ours(LENGTHS)(query, key, value)
    wide = torch.full((2, 9, 2, 2000, 48), torch.nan, dtype=dtype)
    wide[0, :, :, : key.shape[2]], wide[1, :, :, : key.shape[2]] = key, value
    assert same_bits(ours(LENGTHS)(query, *wide), wanted)
    # (batch, tokens, kv_heads, head_dim), and a slice of wider heads that begins at an odd place.
    swapped = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    assert same_bits(ours(LENGTHS)(query, *swapped), wanted)
    sliced = (torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2] for x in (key, value))
    assert same_bits(ours(LENGTHS)(query, *sliced), wanted)
    sparse = torch.stack([query, query], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(ours(LENGTHS)(sparse, key, value), wanted)


@pytest.mark.parametrize("lengths", [[1500], [1500, 400, 1100], [900] * 9], ids=len)
def test_bits_do_not_depend_on_the_number_of_threads(isa, lengths):
    args = inputs(torch.float32, lengths, 4, 6, 2, 64)
    assert_same_bits_for_any_threads(lambda: ours(lengths)(*args))


def test_lengths_may_be_strided():
    args = inputs(torch.float32, [5, 9], 1, 2, 1, 16)
    lengths = torch.tensor([[5, 7], [9, 7]], dtype=torch.int32)[:, 0]
    assert same_bits(decode_attention(*args, lengths), ours([5, 9])(*args))


@pytest.mark.parametrize(
    "dtype, largest",
    [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 65504.0)],
    ids=str,
)
def test_what_a_draft_holds_reaches_no_query_before_it(isa, dtype, largest):
    """Not even NaN and infinity, which a weight of zero would let through."""
    lengths = [310]
    for window in (None, 4, 100):
        query, key, value = inputs(dtype, lengths, 6, 4, 2, 32)
        before = ours(lengths, window=window)(query, key, value)
        for bad in (7.0, largest, -largest, torch.inf, -torch.inf, torch.nan):
            for cache in (key, value):
                kept = cache[:, :, 307].clone()
                cache[:, :, 307] = bad
                after = ours(lengths, window=window)(query, key, value)
                assert same_bits(after[:, :3], before[:, :3])
                assert not torch.equal(after[:, 3:], before[:, 3:])
                cache[:, :, 307] = kept
    assert not before.isnan().any()


def test_what_has_left_the_window_reaches_nobody(isa):
    query, key, value = inputs(torch.float32, [600], 4, 4, 2, 32)
    before = ours([600], window=100)(query, key, value)
    key[:, :, :497], value[:, :, :497] = torch.nan, torch.nan
    assert same_bits(ours([600], window=100)(query, key, value), before)
    value[:, :, 497] = torch.nan  # the oldest slot of the first query
    after = ours([600], window=100)(query, key, value)
    assert after[:, 0].isnan().all() and same_bits(after[:, 1:], before[:, 1:])


def test_nan_is_not_hidden(isa):
    for where in (0, 299, 599):
        for cache in (0, 1):
            args = inputs(torch.float32, [600], 1, 2, 2, 32)
            args[1 + cache][0, 1, where, 5] = torch.nan
            out = ours([600])(*args)
            assert not out[:, :, 0].isnan().any()
            assert out[:, :, 1].isnan().sum() == (1 if cache else 32)


def test_queries_before_the_first_slot_are_zero(isa):
    out = ours([2, 0])(*inputs(torch.float32, [2, 0], 5, 4, 2, 16))
    assert torch.equal(out[0, :3], torch.zeros(3, 4, 16)) and out[0, 3:].abs().min() > 0
    assert torch.equal(out[1], torch.zeros(5, 4, 16))


def test_large_scores(isa):
    """A softmax that subtracts no maximum, or merges blocks of different ones wrongly, shows."""
    for scale in (30.0, -30.0):
        args = inputs(torch.float32, [700], 3, 2, 2, 16)
        assert_as_exact(ours([700], scale=scale), eager([700], scale=scale), args)
        # Blocks ever larger, and ever smaller.
        args[1][0] *= torch.linspace(0, 2, args[1].shape[2])[:, None]
        assert_as_exact(ours([700], scale=scale), eager([700], scale=scale), args)


@pytest.mark.parametrize("shape", [(0, 1, 4, 8), (2, 0, 4, 8), (2, 1, 0, 8), (2, 1, 4, 0)], ids=str)
def test_nothing_to_do(isa, shape):
    query, cache = torch.randn(shape), torch.randn(shape[0], 2, 30, shape[3])
    lengths = torch.full((shape[0],), 30, dtype=torch.int32)
    assert decode_attention(query, cache, cache, lengths).shape == shape
    empty = cache[:, :, :0]
    out = decode_attention(query, empty, empty, torch.zeros_like(lengths))
    assert torch.equal(out, torch.zeros(shape))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_float64_and_the_reference(options):
    lengths = [70, 0, 3, 300]
    args = inputs(torch.float64, lengths, 4, 6, 2, 20)
    wanted = eager(lengths, **options)(*args)
    torch.testing.assert_close(ours(lengths, **options)(*args), wanted)
    for dtype in DTYPES:
        args = inputs(dtype, lengths, 4, 6, 2, 20)
        rest = (torch.tensor(lengths, dtype=torch.int32), 0.3, options.get("window", -1), 0.0)
        got = _decode_attention.op(*args, *rest)
        torch.testing.assert_close(got, _decode_attention.reference(*args, *rest))
        assert got.is_contiguous()


def test_opcheck():
    query, key, value = inputs(torch.float32, [11, 0, 20], 2, 4, 2, 12)
    lengths = torch.tensor([11, 0, 20], dtype=torch.int32)
    opcheck(_decode_attention.op, (query, key, value, lengths, 0.3, -1, 0.0))
    query, key = query.transpose(0, 1).contiguous().transpose(0, 1), key.bfloat16()
    rest = (key, value.bfloat16(), lengths, 0.3, 7, 2.0)
    opcheck(_decode_attention.op, (query.bfloat16(), *rest))


def test_compiles_in_one_graph():
    args = inputs(torch.float32, [8, 12], 3, 4, 2, 16)
    lengths = torch.tensor([8, 12], dtype=torch.int32)

    def fused(*tensors):
        return decode_attention(*tensors, window=6)

    compiled = torch.compile(fused, fullgraph=True)
    assert same_bits(compiled(*args, lengths), fused(*args, lengths))


def test_autocast_takes_the_dtype_of_the_caches():
    query, key, value = inputs(torch.float32, [20], 1, 2, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours([20])(query, key.bfloat16(), value.bfloat16())
        assert ours([20])(query.bfloat16(), key, value).dtype is torch.float32
        wide = tuple(x.double() for x in (query, key, value))
        assert ours([20])(*wide).dtype is torch.float64
    assert same_bits(half, ours([20])(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_refuses_what_would_need_a_gradient():
    query, key, value = inputs(torch.float32, [20], 1, 2, 2, 16)
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        ours([20])(query.requires_grad_(), key, value)
    with torch.no_grad():
        assert not ours([20])(query, key, value).requires_grad
    with pytest.raises(RuntimeError, match="no rule for torch.func"):
        torch.func.vmap(lambda q: ours([20])(q, key, value))(query.detach()[None])


def test_errors_name_the_argument():
    q, k, v = inputs(torch.float32, [10, 10], 1, 4, 2, 8)
    n = torch.tensor([10, 10], dtype=torch.int32)
    for args, options, error, match in (
        ((q[0], k, v, n), {}, ValueError, "query: expected shape"),
        ((q.long(), k, v, n), {}, TypeError, "query: expected a floating-point"),
        ((q.repeat(1, 17, 1, 1), k, v, n), {}, ValueError, "query: expected at most 16"),
        ((q, k.half(), v, n), {}, TypeError, "key_cache: expected torch.float32"),
        ((q, k[0], v, n), {}, ValueError, "key_cache: expected shape"),
        ((q[:, :, :3], k, v, n), {}, ValueError, "key_cache: expected .*divisor of 3"),
        ((q, k[:1], v, n), {}, ValueError, r"key_cache: expected \(2, "),
        ((q, k[..., ::2], v, n), {}, ValueError, "key_cache: expected a contiguous last"),
        ((q, k, v[..., :4], n), {}, ValueError, "value_cache: expected shape"),
        ((q, k, v[:, :, :4], n), {}, ValueError, "value_cache: expected shape"),
        ((q, k, v, n.long()), {}, TypeError, "lengths: expected 2 of torch.int32"),
        ((q, k, v, n[:1]), {}, TypeError, "lengths: expected 2 of"),
        ((q, k, v, n + 4), {}, ValueError, "lengths: expected 0 to the capacity of 13, got 14"),
        ((q, k, v, n - 11), {}, ValueError, "lengths: expected 0 to the capacity of 13, got -1"),
        ((q, k, v, n), {"window": 0}, ValueError, "window: expected"),
        ((q, k, v, n), {"softcap": 0.0}, ValueError, "softcap: expected"),
    ):
        with pytest.raises(error, match=match):
            decode_attention(*args, **options)


def test_the_raw_operator_reads_nothing_out_of_bounds():
    q, k, v = inputs(torch.float32, [10], 1, 4, 2, 8)
    for lengths in ([14], [-1]):
        with pytest.raises(RuntimeError, match="lengths: expected 0 to the capacity of 13"):
            _decode_attention.op(q, k, v, torch.tensor(lengths, dtype=torch.int32), 1.0, -1, 0.0)
