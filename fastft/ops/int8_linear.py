"""int8_linear: a linear layer over a frozen int8 weight, its products of integers both ways.

    y  = (X W^T) sx sw + x[:, C] (W[:, C] sw)^T + bias       X, sx = round(x but for C), row by row
    dx = (G W) sg                                            G, sg = round(dy * sw)

    x (tokens, in), W (out, in) int8, sw (out, 1) float32: the layout "int8" of quantized_linear

round(x) gives int8 numbers in [-127, 127] and a float32 scale per row, its largest size / 127 (the
even one of two neighbours; a row of zeros has scale 0; NaN and infinity make the row's result NaN).
C are the columns of x with the largest numbers, up to 16 of them and one of 32: activations have a
few such columns, which would take the scale of every row, so they stay floating point. They are
found in each x anew, and need no calibration; a row's result depends on the rows beside it by as
much as its rounding does. The weight's scales are folded into dy before it is rounded, so that the
backward product is one of integers too, with the weight as it lies. Sums are exact in 32 bits.
Nothing of x is kept for backward: the weight is frozen. Dynamic per-token quantisation with outlier
columns apart: Dettmers et al. 2022 (LLM.int8()), Yao et al. 2022 (ZeroQuant).

On CPUs with VNNI PyTorch's own integer product (oneDNN) takes 4 int8 products where float32 takes
one: on a Zen 4 core 440 of the 474 GOP/s that there are, whichever way the weight lies. On others
it is slower than float32, and the kernel of csrc/cpu/int8_product.cpp takes 2.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastft.library import (
    first_derivatives_only,
    implement,
    implement_in_triton,
    operator,
    rows_of,
)
from fastft.ops.low_rank import low_rank_add_
from fastft.ops.quantized_linear import QuantizedWeight, frozen_linear
from fastft.ops.round_rows import _round_rows

# Columns that stay floating point; bench/int8_outliers.py has what other numbers cost.
_APART, _ONE_OF = 16, 32


@operator(
    "round_apart(Tensor x, int count)"
    " -> (Tensor values, Tensor scale, Tensor columns, Tensor apart)"
)
def _round_apart(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    peaks = x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1])
    peaks = peaks.float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    columns = peaks.sort(descending=True, stable=True).indices[:count].sort().values
    factors = peaks.new_ones(x.shape[1]).index_fill(0, columns, 0)
    values, scale = _round_rows(x, factors)
    return values, scale, columns, x.index_select(1, columns).float()


@operator("int8_columns(Tensor values, Tensor scale, Tensor columns) -> Tensor")
def _int8_columns(values: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    return (values.index_select(1, columns) * scale[:, None]).t().contiguous()


@operator(
    "int8_product(Tensor a, Tensor a_scale, Tensor b, Tensor? b_scale, Tensor? bias,"
    " bool transposed) -> Tensor"
)
def _int8_product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    # In float64, which holds every sum exactly: PyTorch multiplies no integers on every device.
    y = a.double() @ (b.double() if transposed else b.double().t())
    y = y.float() * a_scale[:, None]
    y = y if b_scale is None else y * b_scale
    return y if bias is None else y + bias


@operator(
    "scale_sums_(Tensor(a!) sums, Tensor a_scale, Tensor? b_scale, Tensor? bias, Tensor? total)"
    " -> ()"
)
def _scale_sums_(
    sums: Tensor, a_scale: Tensor, b_scale: Tensor | None, bias: Tensor | None, total: Tensor | None
) -> None:
    y = sums.float() * a_scale[:, None]
    y = y if b_scale is None else y * b_scale
    y = y if bias is None else y + bias
    sums.copy_((y if total is None else y + total).view(torch.int32))


implement_in_triton("int8_linear", _scale_sums_)
for _op in (_round_apart, _int8_columns):
    implement(_op, "CUDA", "Triton and PyTorch's operators")(_op.reference)


def _has_library(a: Tensor, out: int) -> bool:
    """Whether PyTorch's own integer product takes these sizes, and is the faster one."""
    if a.is_cpu:
        # One input is one row of strides (1, 1), which oneDNN takes for another layout: garbage.
        return torch.cpu._is_vnni_supported() and len(a) > 0 and a.shape[1] > 1 and out > 0
    return a.is_cuda and a.numel() > 0 and not a.shape[1] % 8 and out > 0 and not out % 8


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a b in int32; CUDA's library wants more rows than 16."""
    if a.is_cuda and a.shape[0] <= 16:
        return torch._int_mm(torch.nn.functional.pad(a, (0, 0, 0, 32 - len(a))), b)[: len(a)]
    return torch._int_mm(a, b)


def int8_product(
    a: Tensor,  # (rows, inner) int8
    a_scale: Tensor,  # (rows,) float32
    b: Tensor,  # (out, inner) int8, or (inner, out) where transposed
    b_scale: Tensor | None = None,  # (out,) float32
    bias: Tensor | None = None,  # (out,) float32
    transposed: bool = False,
    total: Tensor | None = None,  # (rows, out) float32
) -> Tensor:
    """(a b^T) a_scale b_scale + bias + total, or with a b: (rows, out) float32, from exact sums."""
    if not _has_library(a, b.shape[1 if transposed else 0]):
        y = _int8_product(a, a_scale, b, b_scale, bias, transposed)
        return y if total is None else y.add_(total)
    sums = _sums(a, b if transposed else b.t())
    # Over the sums themselves, which are as wide: no other memory is read or written.
    _scale_sums_(sums, a_scale, b_scale, bias, total)
    return sums.view(torch.float32)


class Rounded(NamedTuple):
    """x (tokens, in) as the product takes it."""

    values: Tensor  # (tokens, in) int8, zeros in `columns`
    scale: Tensor  # (tokens,) float32
    columns: Tensor  # (count,) int64, ascending
    apart: Tensor  # (tokens, count) float32: x there

    @staticmethod
    def of(x: Tensor) -> "Rounded":
        return Rounded(*_round_apart(x, min(_APART, x.shape[1] // _ONE_OF)))

    def product(
        self,
        values: Tensor,  # (out, in) int8
        scale: Tensor,  # (out,)
        bias: Tensor | None,
        adapter: tuple[Tensor, Tensor] | None = None,  # narrow (tokens, rank), wide (rank, out)
    ) -> Tensor:
        """x W^T + bias + narrow wide: (tokens, out) float32. One pass adds both thin products."""
        y = int8_product(self.values, self.scale, values, scale, bias)
        left, right = [self.apart], [_int8_columns(values, scale, self.columns)]
        if adapter is not None:
            narrow, wide = adapter
            left, right = [*left, narrow], [*right, wide.to(narrow.dtype)]
        if sum(part.shape[1] for part in left):
            low_rank_add_(y, torch.cat(left, 1), torch.cat(right))
        return y


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.dtype = x.dtype
        return Rounded.of(x).product(values, scale, bias).to(x.dtype)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        dbias = dy.sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, dbias
        rounded, row_scale = _round_rows(rows_of(dy), scale)
        dx = int8_product(rounded, row_scale, values, transposed=True).to(ctx.dtype)
        return dx, None, None, dbias


def int8_linear(
    x: Tensor,  # (..., in)
    weight: QuantizedWeight,  # (out, in)
    bias: Tensor | None = None,  # (out,)
) -> Tensor:
    """x W^T + bias for x (..., in): (..., out) in x's dtype, with gradients of x and bias.

    Under autocast x is cast to autocast's dtype. Raises: ValueError or TypeError that names the
    argument; a weight with scales per group, or in four bits, is refused.
    """
    scale = weight.scale
    if weight.values.dtype is not torch.int8 or scale is None or scale.dtype is not torch.float32:
        raise TypeError("weight: expected int8 values with a float32 scale per output channel")
    return frozen_linear(_Int8Linear, x, weight, bias)
