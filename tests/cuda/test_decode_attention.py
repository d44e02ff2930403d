"""decode_attention's CUDA kernels on the host: values, its promise bit for bit, far caches."""

import ctypes

import pytest
import torch
from launching import DTYPES, call, far, pointer
from same import assert_same
from truth import same_bits

from fastft.ops.decode_attention import _decode_attention

BLOCK = 128


class CachedHeads(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class DecodeAttention(ctypes.Structure):
    """kernels/cuda/decode_attention.h"""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("batch", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("q", CachedHeads),
        ("k", CachedHeads),
        ("v", CachedHeads),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("softcap", ctypes.c_float),
        ("partials", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


def launcher(library):
    function = library.fastft_decode_attention

    def launch(query, key, value, lengths, scale=0.3, window=-1, softcap=0.0):
        batch, queries, heads, dim = query.shape
        kv_heads, capacity = key.shape[1:3]
        blocks = (capacity + BLOCK - 1) // BLOCK
        partials = torch.empty(batch * heads * queries * blocks * (dim + 2))
        out = torch.empty(batch, queries, heads, dim, dtype=query.dtype)
        row, token, head, _ = query.stride()
        cached = [CachedHeads(pointer(query), row, token, head)]
        for x in (key, value):
            row, head, token, _ = x.stride()
            cached.append(CachedHeads(pointer(x), row, token, head))
        argument = DecodeAttention(
            DTYPES[query.dtype], batch, queries, heads, kv_heads, dim, capacity, pointer(lengths),
            *cached, scale, 2**40 if window < 0 else window, softcap, pointer(partials),
            pointer(out),
        )  # fmt: skip
        call(function, argument)
        return out

    return launch


@pytest.fixture
def attend(emulated):
    return launcher(emulated("decode_attention"))


def inputs(dtype, lengths, queries, heads, kv_heads, dim, pad=0):
    """Query, caches and lengths. Unused slots hold NaN; the last row of a cache ends its memory."""
    query = torch.randn(len(lengths), queries, heads, dim + pad).to(dtype)[..., :dim]
    shape = 2, len(lengths), kv_heads, max(lengths) + 1, dim + pad
    caches = torch.randn(shape).to(dtype)[..., :dim]
    for row, length in enumerate(lengths):
        caches[:, row, :, length:] = torch.nan
    return query, *caches, torch.tensor(lengths, dtype=torch.int32)


CASES = [(-1, 0.0), (5, 0.0), (150, 2.0)]  # window, softcap


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window, softcap", CASES)
def test_against_the_reference(order, dtype, window, softcap):
    attend = launcher(order("decode_attention"))
    for lengths, queries, heads, kv_heads, dim, pad in (
        ([1, 130, 0], 1, 4, 2, 32, 0),
        ([257], 5, 3, 1, 64, 8),
        ([40], 16, 3, 1, 40, 3),  # rows at odd addresses, three tiles of lines
    ):
        args = inputs(dtype, lengths, queries, heads, kv_heads, dim, pad)
        assert_same(attend, _decode_attention, (*args, 0.3, window, softcap))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 128, 256])
def test_head_dims(attend, dtype, dim):
    args = inputs(dtype, [70], 2, 1, 1, dim)
    assert_same(attend, _decode_attention, (*args, dim**-0.5, -1, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window, softcap", CASES[::2])
def test_bits_of_a_query_depend_on_nothing_beside_it(attend, dtype, window, softcap):
    """A query alone, on one key head, in a cache that is larger and lies otherwise."""
    lengths = [260, 2]
    query, key, value, together = inputs(dtype, lengths, 7, 6, 2, 40)
    together = attend(query, key, value, together, 0.3, window, softcap)
    for row, length in enumerate(lengths):
        wide = torch.full((2, 1, 400, 1, 40), torch.nan, dtype=dtype).transpose(2, 3)
        for to, x in zip(wide, (key, value), strict=True):
            to[0, :, : x.shape[2]] = x[row, 1:]
        for i in (0, 3, 6):
            position = torch.tensor([max(length - 6 + i, 0)], dtype=torch.int32)
            one = query[row : row + 1, i : i + 1, 3:]
            alone = attend(one, *wide, position, 0.3, window, softcap)
            assert same_bits(alone[0, 0], together[row, i, 3:]), (row, i)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_draft_holds_reaches_no_query_before_it(attend, dtype):
    """Not even NaN and infinity, which a weight of zero would let through."""
    for window in (-1, 3):
        args = inputs(dtype, [131], 6, 2, 1, 72)  # queries on both sides of a block's end
        before = attend(*args, window=window)
        largest = 65504.0 if dtype is torch.float16 else 3e38
        for bad in (7.0, largest, torch.inf, torch.nan):
            for cache in args[1:3]:
                kept = cache[:, :, 127].clone()
                cache[:, :, 127] = bad  # the third query
                after = attend(*args, window=window)
                assert same_bits(after[:, :2], before[:, :2])
                seeing = after[:, 2:5]
                assert not seeing.isfinite().all() or bad in (7.0, largest)
                assert not torch.equal(seeing, before[:, 2:5])
                assert same_bits(after[:, 5:], before[:, 5:]) is (window == 3)
                cache[:, :, 127] = kept


def test_nan_is_not_hidden(attend):
    for dtype in DTYPES:
        args = inputs(dtype, [140], 1, 2, 2, 32)
        args[2][0, 1, 5, 7] = torch.nan
        out = attend(*args)
        assert not out[:, :, 0].isnan().any() and out[:, :, 1].isnan().sum() == 1


def test_large_scores_and_blocks_of_different_maxima(attend):
    for dtype in DTYPES:
        for scale in (2.0, -2.0):
            args = inputs(dtype, [300], 2, 1, 1, 16)
            args[1][0, :, :300] *= torch.linspace(0, 2, 300).to(dtype)[:, None]
            assert_same(attend, _decode_attention, (*args, scale, -1, 0.0))


def test_lengths_beyond_the_cache_are_clamped(attend):
    query, key, value, _ = inputs(torch.float16, [130, 130], 3, 2, 1, 16)
    key, value = key[:, :, :130], value[:, :, :130]
    wild = torch.tensor([1000, -5], dtype=torch.int32)
    wanted = attend(query, key, value, torch.tensor([130, 0], dtype=torch.int32))
    assert same_bits(attend(query, key, value, wild), wanted) and wanted[1].eq(0).all()


def test_caches_beyond_2_to_the_31_elements(attend):
    query, key, value, lengths = inputs(torch.float16, [70, 1, 33], 2, 4, 2, 32)
    wanted = attend(query, key, value, lengths)
    assert same_bits(attend(query, far(key), far(value), lengths), wanted)
    # Heads far apart too.
    by_head = (far(x.transpose(0, 1)).transpose(0, 1) for x in (key, value))
    assert same_bits(attend(query, *by_head, lengths), wanted)
