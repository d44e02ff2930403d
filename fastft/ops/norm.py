"""norm: RMSNorm and LayerNorm over the last dimension, with an optional residual added first.

    total = x + residual
    RMSNorm    y = total / sqrt(mean(total^2) + eps) * (offset + weight)      (arXiv 1910.07467)
    LayerNorm  y = (total - mean) / sqrt(var + eps) * weight + bias           (arXiv 1607.06450)

Everything between the read of a row and its write happens in float32, for every dtype; statistics
are kept in float32. Gradients, with n the normalised row and m = dy * weight:

    RMSNorm    dx = rstd * (m - n mean(m n))               dweight = sum over rows of dy n
    LayerNorm  dx = rstd * (m - mean(m) - n mean(m n))     dbias = sum over rows of dy
"""

from typing import Any, overload

import torch
from torch import Tensor

from fastft.library import (
    distinct,
    first_derivatives_only,
    implement_in_triton,
    needs_autograd,
    operator,
    rows_of,
)


def _normalised(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    x = x.to(rstd.dtype)
    return (x if mean is None else x - mean[:, None]) * rstd[:, None]


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x + residual if residual is not None else x.new_empty(0)
    value = (x if residual is None else total).to(wide)
    mean = value.mean(1) if center else value.new_empty(0)
    centred = value - mean[:, None] if center else value
    rstd = torch.rsqrt(centred.square().mean(1) + eps)
    y = centred * rstd[:, None]
    if weight is not None:
        y = y * (weight.to(wide) + offset)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).contiguous(), total.contiguous(), mean, rstd


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = rstd.dtype
    grad, normalised = dy.to(wide), _normalised(x, mean, rstd)
    scaled = grad if weight is None else grad * (weight.to(wide) + offset)
    dx = scaled - normalised * (scaled * normalised).mean(1, keepdim=True)
    if mean is not None:
        dx = dx - scaled.mean(1, keepdim=True)
    dx = dx * rstd[:, None]
    if dtotal is not None:
        dx = dx + dtotal.to(wide)
    dtype = wide if weight is None else weight.dtype
    dweight = (grad * normalised).sum(0).to(dtype) if weight_grad else x.new_empty(0)
    dbias = grad.sum(0).to(dtype) if bias_grad else x.new_empty(0)
    return dx.to(x.dtype).contiguous(), dweight, dbias


@operator(
    "rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor y, Tensor total, Tensor rstd)"
)
def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = _forward(x, residual, weight, None, eps, offset, False)
    return y, total, rstd


@operator(
    "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor rstd,"
    " float offset, bool weight_grad) -> (Tensor dx, Tensor dweight)"
)
def _rms_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return _backward(dy, dtotal, x, weight, None, rstd, offset, weight_grad, False)[:2]


@operator(
    "layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)"
)
def _layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, bias, eps, 0.0, True)


@operator(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor mean,"
    " Tensor rstd, bool weight_grad, bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
def _layer_norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(dy, dtotal, x, weight, mean, rstd, 0.0, weight_grad, bias_grad)


# Where PyTorch's own LayerNorm, one pass already, is as fast or faster: below so many elements (0.7
# to 1 of the kernel's time for 64 rows of 768), twice as many without a residual, and in float32
# without one at any size (a tie up to 2,048 rows of 1,024). Measured on one core; in half precision
# the kernel leads by 1.3 to 1.8 from 512 rows on.
_EAGER_BELOW = 1 << 16


def _eager_layer_norm_wins(x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> bool:
    if not x.is_cpu or torch.compiler.is_compiling() or not _EAGER_BELOW:
        return False
    if any(v is not None and v.dtype is not x.dtype for v in vectors):
        return False
    plain = residual is None and x.dtype is torch.float32
    return plain or x.numel() < (1 if residual is not None else 2) * _EAGER_BELOW


implement_in_triton("norm", _rms_norm, _rms_norm_backward, _layer_norm, _layer_norm_backward)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        center: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # x: (tokens, hidden)
        if center:
            y, total, mean, rstd = _layer_norm(x, residual, weight, bias, eps)
        else:
            y, total, rstd = _rms_norm(x, residual, weight, eps, offset)
            mean = None
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.offset, ctx.center, ctx.has_residual = offset, center, residual is not None
        ctx.set_materialize_grads(False)
        return (y, total) if ctx.has_residual else y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        _, residual_grad, weight_grad, bias_grad, *_ = ctx.needs_input_grad
        if dy is None:
            return dtotal, dtotal if residual_grad else None, None, None, None, None, None
        dy, dtotal = rows_of(dy), None if dtotal is None else rows_of(dtotal)
        dbias = None
        if ctx.center:
            dx, dweight, dbias = _layer_norm_backward(
                dy, dtotal, x, weight, mean, rstd, weight_grad, bias_grad
            )
        else:
            dx, dweight = _rms_norm_backward(dy, dtotal, x, weight, rstd, ctx.offset, weight_grad)
        return (
            dx,
            dx if residual_grad else None,
            dweight if weight_grad else None,
            dbias if bias_grad else None,
            None,
            None,
            None,
        )


def _check(x: Tensor, residual: Tensor | None, **vectors: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, (..., hidden), got a scalar")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual: expected shape {tuple(x.shape)} and {x.dtype} as x has, "
            f"got {tuple(residual.shape)} and {residual.dtype}"
        )
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name}: expected shape ({x.shape[-1]},), got {tuple(vector.shape)}")
        if not vector.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {vector.dtype}")


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    total: Any  # a Tensor where there is a residual
    tensors = rows_of(x), None if residual is None else rows_of(residual), weight, bias
    if needs_autograd(x, residual, weight, bias):
        out = _Norm.apply(*distinct(*tensors), eps, offset, center)
        y, total = (out, None) if residual is None else out
    elif center:
        y, total, *_ = _layer_norm(*tensors, eps)
    else:
        y, total, _ = _rms_norm(*tensors[:3], eps, offset)
    if x.dim() != 2:
        y, total = y.view(x.shape), total if residual is None else total.view(x.shape)
    return y if residual is None else (y, total)


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., eps: float = ..., *, offset: float = ...
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
    offset: float = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor | None,
    offset: float = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,  # (..., hidden)
    weight: Tensor | None = None,  # (hidden,)
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,  # (..., hidden)
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = total / sqrt(mean(total^2) + eps) * (offset + weight), with total = x + residual.

    Args: `offset` is 1 for Gemma's zero-centred weights. x and residual share one dtype (float32,
    bfloat16, float16, float64); weight may be of another. Without weight, the factor is 1.
    Returns: y with x's shape and dtype; with a residual, (y, total).
    Raises: ValueError or TypeError that names the argument.
    """
    _check(x, residual, weight=weight)
    return _norm(x, residual, weight, None, eps, offset, False)


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,  # (..., hidden)
    weight: Tensor | None = None,  # (hidden,)
    bias: Tensor | None = None,  # (hidden,)
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,  # (..., hidden)
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (total - mean) / sqrt(var + eps) * weight + bias, with total = x + residual.

    Arguments, dtypes, returns and errors as for `rms_norm`.
    """
    _check(x, residual, weight=weight, bias=bias)
    if _eager_layer_norm_wins(x, residual, weight, bias):
        total = x if residual is None else x + residual
        y = torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)
        return y if residual is None else (y, total.contiguous())
    return _norm(x, residual, weight, bias, eps, 0.0, True)
