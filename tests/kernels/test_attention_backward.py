"""The Triton attention's backward, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import attention, attention_backward
from same import assert_same
from test_attention import OPTIONS, arguments, bounds, inputs

from fastft.ops.attention import AttentionOptions, _attention, _attention_backward


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(attention_backward, "tile", lambda *_: attention.Tile(16, 16, 4, 1))


def backward(args, needed=(True, True, True), dout=None):
    out, lse = _attention.reference(*args)
    dout = torch.randn_like(out) if dout is None else dout
    return (dout, *args[:3], out, lse, *args[3:], *needed)


def assert_right(args):
    # The reference's float16 gradients are rounded once; here p and ds are too, as factors.
    half = args[0].dtype is torch.float16
    assert_same(
        attention_backward.attention_backward, _attention_backward, args, 2.0 if half else 1.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    assert_right(backward(arguments(dtype, 2, 1, 16, **OPTIONS[name])))


@pytest.mark.parametrize("head_dim", [1, 24, 80, 256])
def test_head_dims(head_dim):
    assert_right(backward(arguments(torch.float32, 1, 1, head_dim, causal=True)))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_nobody_asked_for(needed):
    assert_right(backward(arguments(torch.float32, 1, 1, 16, causal=True), needed))


def test_rows_that_lie_apart():
    fused = torch.randn(40, 6, 2, 24)
    query, key, value = fused[:, ::2, 0, :16], fused[:, 1:2, 1, 4:20], fused[:, 2:3, 0, :16]
    dout = torch.randn(3, 40, 16).transpose(0, 1)
    cu = bounds((7, 33))
    args = (query, key, value, cu, cu, None, *AttentionOptions(0.3, True))
    assert_right(backward(args, dout=dout))


def test_unequal_tiles(monkeypatch):
    for shape in (attention.Tile(32, 16, 4, 1), attention.Tile(16, 32, 4, 1)):
        monkeypatch.setattr(attention_backward, "tile", lambda *_, shape=shape: shape)
        assert_right(backward(arguments(torch.float32, 1, 1, 16, causal=True)))
        assert_right(backward(arguments(torch.float32, 1, 1, 16, causal=True, window=7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_wider_than_128_on_turing(monkeypatch, dtype):
    monkeypatch.undo()
    monkeypatch.setattr(attention_backward, "capability", lambda _: 75)
    assert_right(backward(arguments(dtype, 1, 1, 136, causal=True, window=9)))


def test_nothing():
    for q, k in (((), ()), ((0, 0), (0, 0)), ((0,), (3,)), ((3,), (0,))):
        args = (*inputs(torch.float32, 2, 1, 16, q, k), bounds(q), bounds(k), None)
        assert_right(backward((*args, *AttentionOptions(0.25))))
