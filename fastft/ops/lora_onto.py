"""lora_onto: an adapter added to a base product made elsewhere, by a 4-bit or 8-bit layer for one.

out = y + s D(x) A^T B^T         see fastft.ops.lora for the gradients
"""

from typing import Any

import torch
from torch import Tensor

from fastft.library import distinct, first_derivatives_only, rows_of
from fastft.ops.lora import LoraLinear, _Group, check_adapter, dropout_mask
from fastft.ops.low_rank import low_rank_add_, low_rank_dot, low_rank_sum


class _LoraOnto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        mask: Tensor | None,
        scale: float,
        keep_scale: float,
    ) -> Tensor:
        # y: (tokens, out), x: (tokens, in)
        xa = low_rank_dot(x, a, mask, keep_scale)
        out = y.clone()
        low_rank_add_(out, xa, b.t(), None, 1.0, scale)
        ctx.save_for_backward(x, a, b, mask, xa)
        ctx.scale, ctx.keep_scale = scale, keep_scale
        return out

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, mask, xa = ctx.saved_tensors
        _, x_grad, a_grad, b_grad, *_ = ctx.needs_input_grad
        dy = rows_of(dy)
        u = low_rank_dot(dy, b.t(), None, 1.0, ctx.scale)
        dx = None
        if x_grad:
            dx = torch.zeros_like(x)
            low_rank_add_(dx, u, a, mask, ctx.keep_scale)
        da = low_rank_sum(x, u, mask, ctx.keep_scale).to(a.dtype) if a_grad else None
        db = low_rank_sum(dy, xa, None, 1.0, ctx.scale).t().to(b.dtype) if b_grad else None
        return dy, dx, da, db, None, None, None


def lora_onto(y: Tensor, x: Tensor, linear: LoraLinear) -> Tensor:
    """y + scale * dropout(x) A^T B^T, for a base product y (..., out) made elsewhere.

    linear.weight and linear.bias are not read. Returns a new tensor of y's dtype.
    """
    if linear.a is None or linear.b is None:
        return y
    if not x.is_floating_point() or x.dim() == 0:
        raise TypeError(
            f"x: expected a floating-point tensor (..., in), got {x.dtype} {tuple(x.shape)}"
        )
    if linear.b.dim() != 2:
        raise ValueError(f"linear: expected b (out, rank), got {tuple(linear.b.shape)}")
    if y.shape != (*x.shape[:-1], linear.b.shape[0]):
        raise ValueError(f"y: expected {(*x.shape[:-1], linear.b.shape[0])}, got {tuple(y.shape)}")
    check_adapter("linear", linear, y.shape[-1], x.shape[-1])
    dtypes = {y.dtype, x.dtype, linear.a.dtype, linear.b.dtype}
    if torch.float64 in dtypes and len(dtypes) > 1:
        raise TypeError(
            f"y, x, a, b: expected float64 in all or none of them, got {y.dtype}, {x.dtype}, "
            f"{linear.a.dtype}, {linear.b.dtype}"
        )
    if not y.is_floating_point():
        raise TypeError(f"y: expected a floating-point tensor, got {y.dtype}")
    rows = rows_of(x)
    mask = dropout_mask(rows, linear.dropout)
    keep_scale = _Group.of((linear,)).keep_scales[0]
    tensors = distinct(rows_of(y), rows, linear.a, linear.b, mask)
    out = _LoraOnto.apply(*tensors, linear.scale, keep_scale)
    found: Tensor = out.view(y.shape)
    return found
