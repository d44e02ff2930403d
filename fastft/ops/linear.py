"""linear: y = x W^T + bias for trained weights, on the device's faster GEMM library.

    dx = dy W        dW = dy^T x        dbias = sum over rows of dy

It is worth its own operator where PyTorch sends float32 products to the slower of its two libraries
(see gemm): there all three products take half the time. Everywhere else, and for small layers,
torch.nn.functional.linear runs. Where the weight is frozen no dW is computed.

Activations and a residual's addition stay passes of their own: of a MiniLM step on two cores, GELU
and its gradient are 1.5 %, the twelve additions less than 1 %, and query, key and value as one
product would run at the speed of three (384 x 1152: 440 GFLOP/s, 384 x 384: 434).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft.library import (
    distinct,
    first_derivatives_only,
    implement,
    needs_autograd,
    operator,
    rows_of,
)
from fastft.ops import gemm


@operator("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@operator(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(torch.mm, dy, x, weight, needs)


def _gradients(
    product: Callable[..., Tensor], dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """needs: x, weight, bias; what is not needed is empty."""
    dx = product(dy, weight) if needs[0] else x.new_empty(0)
    dweight = product(dy.t(), x).contiguous() if needs[1] else x.new_empty(0)
    return dx, dweight, dy.sum(0) if needs[2] else x.new_empty(0)


@implement(_linear, "CPU", "PyTorch's products")
def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return gemm.matmul(x, weight.t(), bias)


@implement(_linear_backward, "CPU", "PyTorch's products")
def _linear_backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(gemm.matmul, dy, x, weight, needs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        grads = _linear_backward(rows_of(dy), x, weight, needs)
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _wins(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the faster library is another one than torch.nn.functional.linear's."""
    plain = (Tensor, torch.nn.Parameter)
    if type(x) not in plain or type(weight) not in plain or x.layout is not torch.strided:
        return False  # a subclass may have a product of its own
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False  # torch's function says what is wrong
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return False
    return gemm.uses_onednn(x.shape[:-1].numel(), weight, x)


def linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> Tensor:
    """torch.nn.functional.linear(x, weight, bias), at most as slow: (..., out).

    Dtypes, autocast and errors are that function's; so is the code, where it is as fast.
    """
    if torch.is_autocast_enabled(x.device.type) or not _wins(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    arguments: list[Any] = distinct(rows_of(x), weight, bias)
    function = _Linear.apply if needs_autograd(x, weight, bias) else _linear
    return function(*arguments).view(*x.shape[:-1], weight.shape[0])
