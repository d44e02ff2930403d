"""The Triton attention, interpreted, against the reference."""

from types import SimpleNamespace

import pytest
import torch
from fastft.kernels import attention
from same import assert_same

from fastft.ops.attention import AttentionOptions, _attention

# Empty on either side and on both; more queries than keys (rows that see no key) and fewer.
LENGTHS_Q = (37, 0, 1, 18, 2, 0)
LENGTHS_K = (37, 3, 18, 7, 0, 0)
OPTIONS = {
    "bidirectional": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "both sides": {"window": 4},
    "softcap": {"causal": True, "softcap": 2.0},
    "dropout": {"dropout": 0.3},
    "everything": {"causal": True, "window": 17, "softcap": 1.5, "dropout": 0.6},
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several blocks per sequence at the least work."""
    monkeypatch.setattr(attention, "tile", lambda *_: attention.Tile(16, 16, 4, 1))


def bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def inputs(dtype, heads, kv_heads, head_dim, q=LENGTHS_Q, k=LENGTHS_K):
    tokens = sum(q), sum(k), sum(k)
    return [
        torch.randn(n, h, head_dim).to(dtype)
        for n, h in zip(tokens, (heads, kv_heads, kv_heads), strict=True)
    ]


def arguments(dtype, heads, kv_heads, head_dim, **options):
    seed = torch.tensor(2**61 + 12345) if options.get("dropout") else None
    options = AttentionOptions(head_dim**-0.5 * 2, **options)
    lengths = bounds(LENGTHS_Q), bounds(LENGTHS_K, torch.int64)
    return (*inputs(dtype, heads, kv_heads, head_dim), *lengths, seed, *options)


def finite(op):
    """op, its infinite lse (of rows that see no key) replaced by a number that can be compared."""

    def call(*args):
        out, lse = op(*args)
        return out, lse.masked_fill(lse == -torch.inf, 1000.0)

    return call


def assert_right(args):
    assert_same(
        finite(attention.attention), SimpleNamespace(reference=finite(_attention.reference)), args
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    assert_right(arguments(dtype, 2, 1, 16, **OPTIONS[name]))


@pytest.mark.parametrize("head_dim", [1, 24, 40, 80, 192, 256])
def test_head_dims(head_dim):
    args = arguments(torch.float32, 1, 1, head_dim, causal=True)
    assert_right(args)


def test_grouped_heads():
    assert_right(arguments(torch.float32, 6, 2, 16, dropout=0.5))


def test_rows_that_lie_apart():
    fused = torch.randn(40, 6, 2, 24)
    query, key, value = fused[:, ::2, 0, :16], fused[:, 1:2, 1, 4:20], fused[:, 2:3, 0, :16]
    heads_first = torch.randn(3, 40, 16).transpose(0, 1)
    cu = bounds((7, 33))
    for q in (query, heads_first):
        args = (q, key, value, cu, cu, None, *AttentionOptions(0.3, True))
        assert_right(args)


def test_the_tiles_of_a_device(monkeypatch):
    monkeypatch.undo()
    query, key, value = inputs(torch.float16, 2, 1, 64, (130, 5), (130, 70))
    cu = bounds((130, 5)), bounds((130, 70))
    args = (query, key, value, *cu, None, *AttentionOptions(0.125, True))
    assert_right(args)


def test_scores_far_from_zero():
    query, key, value = inputs(torch.float32, 1, 1, 16)
    args = (100 * query, key, value, bounds(LENGTHS_Q), bounds(LENGTHS_K), None)
    assert_right((*args, *AttentionOptions(1.0, True)))


def test_nothing_and_what_is_refused():
    for lengths in ((), (0, 0)):
        args = (*inputs(torch.float32, 2, 1, 16, (), ()), bounds(lengths), bounds(lengths), None)
        assert_right((*args, *AttentionOptions(0.25)))
    cu = bounds((2,))
    for dtype, head_dim, wanted in ((torch.float64, 16, "float16"), (torch.float32, 257, "up to")):
        args = (*inputs(dtype, 1, 1, head_dim, (2,), (2,)), cu, cu, None, *AttentionOptions(1.0))
        with pytest.raises((TypeError, ValueError), match=wanted):
            attention.attention(*args)
