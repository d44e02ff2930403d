"""base_product: the product of a linear layer's own weight, under the adapters of fastft.ops.lora.

    y = x W^T + bias            dx = total + dy W

The weight is floating point, or int8 with a float32 scale per output channel; the products are then
those of fastft.ops.int8_linear, and linears that share an input share its rounding.
"""

import torch
from torch import Tensor

from fastft.ops import gemm
from fastft.ops.int8_linear import _round_rows, int8_product


class Input:
    """x (tokens, in), and what it is rounded to, once, when first wanted."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._rounded: tuple[Tensor, Tensor] | None = None

    def rounded(self) -> tuple[Tensor, Tensor]:
        if self._rounded is None:
            self._rounded = _round_rows(self.x, None)
        return self._rounded


def forward_weight(weight: Tensor, transposed: bool) -> Tensor:
    return weight if transposed else weight.t()  # (in, out)


def base_product(
    given: Input,
    weight: Tensor,  # (out, in), or (in, out) if transposed; int8: (out, in)
    scale: Tensor | None,  # (out,) of an int8 weight
    bias: Tensor | None,  # (out,)
    transposed: bool,
) -> Tensor:
    """x W^T + bias: (tokens, out), a new tensor of x's dtype."""
    if weight.dtype is not torch.int8:
        return gemm.matmul(given.x, forward_weight(weight, transposed), bias)
    bias = None if bias is None else bias.float()
    return int8_product(*given.rounded(), weight, scale, bias).to(given.x.dtype)


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
    w = forward_weight(weight, transposed).t()
    return gemm.matmul(dy, w) if total is None else gemm.add_matmul(total, dy, w)
