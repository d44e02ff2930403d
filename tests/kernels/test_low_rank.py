"""The Triton thin products, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import low_rank
from same import assert_same

from fastft.ops.low_rank import _low_rank_add_, _low_rank_dot, _low_rank_sum


class Added:
    """low_rank_add_'s reference as a function of its arguments, which it must not write."""

    @staticmethod
    def reference(matrix, *args):
        # Strides are kept: the kernel is to write into rows that lie apart.
        matrix = matrix.detach().clone()
        _low_rank_add_.reference(matrix, *args)
        return matrix


def added(matrix, *args):
    room = torch.full((matrix.shape[0], matrix.shape[1] + 5), 7.0, dtype=matrix.dtype)
    inner = room[:, : matrix.shape[1]]
    inner.copy_(matrix)
    assert low_rank.low_rank_add_(inner, *args) is None
    assert (room[:, matrix.shape[1] :] == 7.0).all()
    return inner.contiguous()


def check(matrix, rank, mask, wide=None, narrow=None):
    rows, columns = matrix.shape
    wide = torch.randn(rank, columns) if wide is None else wide
    narrow = torch.randn(rows, rank) if narrow is None else narrow
    options = mask, 1.25, 0.75
    assert_same(low_rank.low_rank_dot, _low_rank_dot, (matrix, wide, *options))
    assert_same(low_rank.low_rank_sum, _low_rank_sum, (matrix, narrow, *options))
    assert_same(added, Added, (matrix, narrow, wide, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "rank"), [((1, 1), 1), ((33, 70), 8), ((5, 130), 16), ((70, 65), 33), ((17, 64), 64)]
)
def test_thin_products(dtype, masked, shape, rank):
    matrix = torch.randn(*shape).to(dtype)
    check(matrix, rank, torch.rand(*shape) > 0.3 if masked else None)


def test_operands_that_lie_apart():
    # lora passes b.t(), slices of joint products, and adapters of the model's own dtype.
    matrix = torch.randn(40, 3, 50)[:, 1]
    wide, narrow = torch.randn(50, 9).half().t(), torch.randn(40, 30)[:, 4:13]
    check(matrix, 9, None, wide, narrow)
    check(matrix, 9, torch.rand(40, 50) > 0.5, wide, narrow)


@pytest.mark.parametrize(("shape", "rank"), [((0, 20), 4), ((6, 20), 0), ((6, 0), 4)])
def test_nothing_to_multiply(shape, rank):
    check(torch.randn(*shape), rank, None)


def test_many_row_groups_give_the_same_bits_twice():
    matrix, narrow = torch.randn(600, 20), torch.randn(600, 4)
    first, second = (low_rank.low_rank_sum(matrix, narrow, None, 1.0, 1.0) for _ in range(2))
    assert torch.equal(first, second)
    assert_same(low_rank.low_rank_sum, _low_rank_sum, (matrix, narrow, None, 1.0, 1.0))


def test_too_large_a_rank():
    with pytest.raises(ValueError, match="rank: expected up to"):
        low_rank.low_rank_dot(torch.randn(2, 4), torch.randn(65, 4), None, 1.0, 1.0)
