"""base_product: the product of a linear layer's own weight, under the adapters of fastft.ops.lora.

    y = x W^T + bias + narrow wide            dx = total + dy W

The weight is floating point, or int8 or fp8 with a float32 scale per output channel; the products
are then those of fastft.ops.int8_linear or fp8_linear, and linears that share an input share its
rounding.
"""

from functools import cached_property

import torch
from torch import Tensor

from fastft.ops import gemm
from fastft.ops.fp8_linear import fp8_product
from fastft.ops.int8_linear import Rounded, int8_product
from fastft.ops.low_rank import low_rank_add_
from fastft.ops.round_rows import FP8, _round_rows, _round_rows_fp8


class Input:
    """x (tokens, in), and what it is rounded to, each once, when first wanted."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def int8(self) -> Rounded:
        return Rounded.of(self.x)

    @cached_property
    def fp8(self) -> tuple[Tensor, Tensor]:
        return _round_rows_fp8(self.x, None)


def forward_weight(weight: Tensor, transposed: bool) -> Tensor:
    return weight if transposed else weight.t()  # (in, out)


def base_product(
    given: Input,
    weight: Tensor,  # (out, in), or (in, out) if transposed; int8, fp8: (out, in)
    scale: Tensor | None,  # (out,) of an int8 or fp8 weight
    bias: Tensor | None,  # (out,)
    transposed: bool,
    narrow: Tensor,  # (tokens, rank) of an adapter; rank may be 0
    wide: Tensor,  # (rank, out)
    factor: float,  # of narrow
) -> Tensor:
    """x W^T + bias + factor narrow wide: (tokens, out), a new tensor of x's dtype."""
    if scale is not None and weight.dtype is torch.int8:
        bias = None if bias is None else bias.float()
        y = given.int8.product(weight, scale, bias, (narrow * factor, wide))
        return y.to(given.x.dtype)
    if weight.dtype is FP8:
        y = fp8_product(*given.fp8, weight, scale, given.x.dtype, bias)
    else:
        y = gemm.matmul(given.x, forward_weight(weight, transposed), bias)
    if narrow.shape[1]:
        low_rank_add_(y, narrow, wide, None, 1.0, factor)
    return y


def base_input_gradient(
    total: Tensor | None,  # (tokens, in), or None for zeros
    dy: Tensor,  # (tokens, out)
    weight: Tensor,
    scale: Tensor | None,
    transposed: bool,
) -> Tensor:
    """total + dy W: (tokens, in), a new tensor of dy's dtype."""
    if weight.dtype is torch.int8:
        added = None if total is None else total.float()
        dx = int8_product(*_round_rows(dy, scale), weight, transposed=True, total=added)
        return dx.to(dy.dtype)
    if weight.dtype is FP8:
        dx = fp8_product(*_round_rows_fp8(dy, scale), weight, None, dy.dtype, transposed=True)
        return dx if total is None else dx.add_(total)
    w = forward_weight(weight, transposed).t()
    return gemm.matmul(dy, w) if total is None else gemm.add_matmul(total, dy, w)
