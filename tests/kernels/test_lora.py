"""The experiment of one product for a linear layer and its adapter, interpreted, against `lora`."""

import pytest
import torch
from fastft.kernels import lora
from same import assert_same

from fastft.ops.lora import _lora


class Separate:
    """y and x A^T of the operator, one linear layer."""

    @staticmethod
    def reference(x, weight, bias, a, b, scale):
        (y,), (xa,) = _lora.reference(
            x, [weight], [None], [bias], [a], [b], [None], [scale], [1.0], [False]
        )
        return y, xa


def check(rows, depth, columns, rank, adapter=torch.float16, bias=True, weight=None):
    x = torch.randn(rows, 2 * depth).half()[:, :depth]
    weight = (torch.randn(columns, depth) * 0.1).half() if weight is None else weight
    a, b = torch.randn(rank, depth).to(adapter), torch.randn(columns, rank).to(adapter)
    bias = torch.randn(columns).half() if bias else None
    assert_same(lora.lora_product, Separate, (x, weight, bias, a, b, 0.5))


@pytest.mark.parametrize("adapter", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (130, 8), (40, 16)])
def test_values(adapter, rows, rank):
    check(rows, 80, 144, rank, adapter)


def test_many_blocks_of_rows_and_columns():
    check(128 * (lora.GROUP + 1) + 3, 16, 272, 4, bias=False)


def test_weights_that_lie_otherwise():
    check(20, 32, 48, 8, weight=(torch.randn(32, 48) * 0.1).half().t())


def test_nothing_to_multiply():
    check(0, 16, 16, 4)


def test_a_float32_adapter_keeps_its_bits():
    """Against an adapter rounded to x's dtype, which would be a thousand times further away."""
    x, a = torch.randn(8, 64).half(), torch.randn(4, 64)
    zeros = torch.zeros(16, 64).half(), None
    _, xa = lora.lora_product(x, *zeros, a, torch.zeros(16, 4), 1.0)
    truth = x.double() @ a.double().t()
    error = (xa - truth).norm()
    assert error < 1e-3 * (x.double() @ a.half().double().t() - truth).norm()


def test_what_is_left_where_the_layer_and_its_adapter_cancel():
    x, first = torch.randn(8, 16).half(), torch.eye(16)[:1]
    b = torch.full((16, 1), 1.0 + 2.0**-12)
    weight = -first.half().expand(16, 16).contiguous()
    y, _ = lora.lora_product(x, weight, None, first, b, 1.0)
    torch.testing.assert_close(y.float(), (x[:, :1].float() * 2.0**-12).expand(8, 16))


def test_what_it_does_not_take():
    x, weight = torch.randn(4, 32).half(), torch.randn(16, 32).half()
    with pytest.raises(ValueError, match="expected multiples of 16"):
        lora.lora_product(x[:, :20], weight[:, :20], None, x[:1, :20], weight[:, :1], 1.0)
    with pytest.raises(ValueError, match="a: expected 1 to 21 rows, got 22"):
        lora.lora_product(x, weight, None, torch.randn(22, 32), torch.randn(16, 22), 1.0)
