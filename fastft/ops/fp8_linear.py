"""fp8_linear: a linear layer over a frozen fp8 weight, its products of fp8 numbers both ways.

    y  = (X W^T) sx sw + bias                                X, sx = round(x), row by row
    dx = (G W) sg                                            G, sg = round(dy * sw)

    x (tokens, in), W (out, in) e4m3, sw (out, 1) float32: the layout "fp8" of quantized_linear

round(x) gives numbers of e4m3 (4 bits of exponent, 3 of mantissa, up to 448) and a float32 scale
per row, its largest size / 448 (fastft/ops/round_rows.py). No columns stay out, as they do in
int8_linear: a floating-point format keeps small numbers beside large ones, down to 1/28672 of the
row's largest with all its digits. The weight's scales are folded into dy before it is rounded.
Nothing of x is kept for backward: the weight is frozen. The format: Micikevicius et al. 2022 (FP8
formats for deep learning); e4m3 for gradients too, since each row has a scale of its own.

On CUDA the products are PyTorch's, with a scale per row and per column (torch._scaled_mm). It gives
bfloat16, whatever x is; takes sizes that are multiples of 16, others go to the reference; and reads
both operands along the sum, so backward writes W once more, transposed: a byte a number, by that
about a hundredth of a step at Llama sizes. The reference multiplies in float32 and rounds once, to
x's type.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastft.library import (
    first_derivatives_only,
    implement,
    operator,
    rows_of,
)
from fastft.ops.quantized_linear import QuantizedWeight, frozen_linear
from fastft.ops.round_rows import FP8, _round_rows_fp8

# The sums stay in the tensor cores, with some 13 bits of mantissa on Hopper, rather than going to
# float32 every 128 terms. That is less exact by less than the rounding of the operands, which have
# 4 bits, and PyTorch's kernel without it is far slower (pytorch/pytorch#147971).
_FAST_SUMS = True
_MULTIPLE = 16
_TRIED = 128  # rows and columns of the product that tells whether there is one
CAPABILITY = (8, 9)  # Ada; then Hopper, Blackwell


@operator(
    "fp8_product(Tensor a, Tensor a_scale, Tensor b, Tensor? b_scale, Tensor? bias,"
    " bool transposed, ScalarType dtype) -> Tensor"
)
def _fp8_product(
    a: Tensor,  # (rows, inner)
    a_scale: Tensor,  # (rows,)
    b: Tensor,  # (out, inner), or (inner, out) where transposed
    b_scale: Tensor | None,  # (out,)
    bias: Tensor | None,  # (out,)
    transposed: bool,
    dtype: torch.dtype,  # of the result
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    y = a.to(wide) @ (b.to(wide) if transposed else b.to(wide).t())
    y = y * a_scale[:, None]
    y = y if b_scale is None else y * b_scale
    return (y if bias is None else y + bias).to(dtype)


def fits(inner: int, out: int) -> bool:
    """Whether PyTorch's product takes these sizes of a weight; else the reference computes it."""
    return min(inner, out) > 0 and inner % _MULTIPLE == 0 and out % _MULTIPLE == 0


@implement(_fp8_product, "CUDA", "PyTorch's fp8 product")
def _library_product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = b.shape[1 if transposed else 0]
    if not len(a) or not fits(a.shape[1], out):
        y: Tensor = _fp8_product.reference(a, a_scale, b, b_scale, bias, transposed, dtype)
        return y
    # As bytes: not every device copies fp8, and all copy these.
    b = b.view(torch.int8).t().contiguous().view(FP8) if transposed else b
    scale = a_scale.new_ones(out) if b_scale is None else b_scale
    y = torch._scaled_mm(
        a,
        b.t(),
        a_scale[:, None],
        scale.contiguous()[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=_FAST_SUMS,
    )
    return y.to(dtype)


def fp8_product(
    a: Tensor,  # (rows, inner) e4m3
    a_scale: Tensor,  # (rows,) float32
    b: Tensor,  # (out, inner) e4m3, or (inner, out) where transposed
    b_scale: Tensor | None,  # (out,) float32
    dtype: torch.dtype,
    bias: Tensor | None = None,  # (out,)
    transposed: bool = False,
) -> Tensor:
    """(a b^T) a_scale b_scale + bias, or with a b: (rows, out) in `dtype`."""
    return _fp8_product(a, a_scale, b, b_scale, bias, transposed, dtype)


def why_not(device: torch.device) -> str | None:
    """What this device lacks for fp8 products at full speed; None if nothing."""
    if device.type != "cuda":
        return f"the layers lie on {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "this is a ROCm build of PyTorch, which has another fp8 format"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the {name} has compute capability {major}.{minor}"
    # Some builds of PyTorch lack the product for some cards: that only trying it tells.
    ones = torch.ones(_TRIED, _TRIED, device=device).to(FP8)
    scale = torch.ones(_TRIED, device=device)
    try:
        y = _fp8_product(ones, scale, ones, scale, None, False, torch.bfloat16)
        right = bool((y == _TRIED).all())
    except RuntimeError as error:
        return f"PyTorch's product does not run there: {str(error).splitlines()[0]}"
    return None if right else "PyTorch's product gives a wrong result there"


def quantize_fp8(weight: Tensor) -> QuantizedWeight:
    """A weight (out, in) in e4m3, one float32 scale per output channel; zeros have scale 0.

    Raises: ValueError or TypeError that names the argument; NaN and infinity are refused.
    """
    if not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(
            f"weight: expected floating point (out, in), got {weight.dtype} {tuple(weight.shape)}"
        )
    values, scale = _round_rows_fp8(rows_of(weight.detach()), None)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weight: expected finite values, got NaN or infinity")
    return QuantizedWeight(values, scale[:, None])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.dtype = x.dtype
        return fp8_product(*_round_rows_fp8(x, None), values, scale, x.dtype, bias)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        dbias = dy.sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, dbias
        rounded = _round_rows_fp8(rows_of(dy), scale)
        dx = fp8_product(*rounded, values, None, ctx.dtype, transposed=True)
        return dx, None, None, dbias


def fp8_linear(
    x: Tensor,  # (..., in)
    weight: QuantizedWeight,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> Tensor:
    """x W^T + bias for x (..., in): (..., out) in x's dtype, with gradients of x and bias.

    Under autocast x is cast to autocast's dtype. Raises: ValueError or TypeError that names the
    argument.
    """
    scale = weight.scale
    if weight.values.dtype is not FP8 or scale is None:
        raise TypeError("weight: expected e4m3 values with a float32 scale per output channel")
    return frozen_linear(_Fp8Linear, x, weight, bias)
