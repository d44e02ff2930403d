"""RMSNorm and LayerNorm: one program reads a row once and writes it once, sums in float32.

The gradient of the weight is summed over a fixed set of row groups and then over the groups, in the
same order always: no atomics.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import norm_wide
from .common import (
    ARCHITECTURES,
    BFLOAT16,
    NAMES,
    Configuration,
    next_power_of_2,
    on_device,
    processors,
    warps_for,
)

# A longer row would not fit the registers of one program: norm_wide takes it in blocks.
LONGEST = 8192


@triton.jit
def _forward(
    x, residual, weight, bias, y, total, mean, rstd,
    x_stride, residual_stride, hidden, eps, offset,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(
            tl.float32
        )
        # The sum is what the model carries on, so it is normalised as stored, rounded.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * hidden + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTER:
        average = tl.sum(value, 0) / hidden
        tl.store(mean + row, average)
        value = tl.where(inside, value - average, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / hidden + eps)
    tl.store(rstd + row, scale)
    out = value * scale
    if HAS_WEIGHT:
        out *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * hidden + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias,
    dy_stride, dtotal_stride, x_stride, rows, hidden, offset,
    CENTER: tl.constexpr, HAS_DTOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    groups = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    if HAS_WEIGHT:
        factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for row_index in range(group, rows, groups):
        row = tl.full([], 0, tl.int64) + row_index
        normalised = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        if CENTER:
            normalised -= tl.load(mean + row)
        normalised = tl.where(inside, normalised * scale, 0.0)
        grad = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT_GRAD:
            weight_sum += grad * normalised
        if BIAS_GRAD:
            bias_sum += grad
        if HAS_WEIGHT:
            grad *= factor
        out = grad - normalised * (tl.sum(grad * normalised, 0) / hidden)
        if CENTER:
            out -= tl.sum(grad, 0) / hidden
        out *= scale
        if HAS_DTOTAL:
            out += tl.load(dtotal + row * dtotal_stride + columns, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(dx + row * hidden + columns, out.to(dx.dtype.element_ty), mask=inside)
    place = group.to(tl.int64) * hidden
    if WEIGHT_GRAD:
        tl.store(dweight + place + columns, weight_sum, mask=inside)
    if BIAS_GRAD:
        tl.store(dbias + place + columns, bias_sum, mask=inside)


def _normalise(x, residual, weight, bias, eps, offset, center):
    rows, hidden = x.shape
    y = x.new_empty(rows, hidden)
    total = x.new_empty(rows, hidden) if residual is not None else x.new_empty(0)
    mean = x.new_empty(rows if center else 0, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if hidden > LONGEST:
        norm_wide.normalise(x, residual, weight, bias, (y, total, mean, rstd), eps, offset, center)
    elif rows:
        block = next_power_of_2(hidden)
        with on_device(x):
            _forward[(rows,)](
                x, residual, weight, bias, y, total, mean, rstd,
                x.stride(0), 0 if residual is None else residual.stride(0), hidden, eps, offset,
                CENTER=center, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps_for(block),
            )  # fmt: skip
    return y, total, mean, rstd


def _partial(dy, dtotal, x, weight, mean, rstd, dx, offset, center, weight_grad, bias_grad):
    """Fills dx; gives the sums of dweight and dbias over groups of rows, a row for each group."""
    rows, hidden = x.shape
    block = next_power_of_2(hidden)
    groups = max(1, min(rows, 4 * processors(x)))
    partial = [
        x.new_empty(groups if needed else 0, hidden, dtype=torch.float32)
        for needed in (weight_grad, bias_grad)
    ]
    with on_device(x):
        _backward[(groups,)](
            dy, dtotal, x, weight, mean, rstd, dx, *partial,
            dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0), rows, hidden,
            offset,
            CENTER=center, HAS_DTOTAL=dtotal is not None, HAS_WEIGHT=weight is not None,
            WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
    return partial


def _gradients(dy, dtotal, x, weight, mean, rstd, offset, center, weight_grad, bias_grad):
    dx = x.new_empty(x.shape)
    args = dy, dtotal, x, weight, mean, rstd, dx, offset
    if x.shape[1] > LONGEST:
        partial = norm_wide.gradients(*args, weight_grad, bias_grad)
    else:
        partial = _partial(*args, center, weight_grad, bias_grad)
    dtype = torch.float32 if weight is None else weight.dtype
    sums = [
        part.sum(0).to(dtype) if needed else x.new_empty(0)
        for part, needed in zip(partial, (weight_grad, bias_grad), strict=True)
    ]
    return dx, *sums


def rms_norm(x, residual, weight, eps, offset):
    y, total, _, rstd = _normalise(x, residual, weight, None, eps, offset, False)
    return y, total, rstd


def rms_norm_backward(dy, dtotal, x, weight, rstd, offset, weight_grad):
    return _gradients(dy, dtotal, x, weight, None, rstd, offset, False, weight_grad, False)[:2]


def layer_norm(x, residual, weight, bias, eps):
    return _normalise(x, residual, weight, bias, eps, 0.0, True)


def layer_norm_backward(dy, dtotal, x, weight, mean, rstd, weight_grad, bias_grad):
    return _gradients(dy, dtotal, x, weight, mean, rstd, 0.0, True, weight_grad, bias_grad)


MULTIPLES = ("dy_stride", "dtotal_stride", "x_stride", "residual_stride", "hidden")


def configurations() -> Iterator[Configuration]:
    for dtype, name in NAMES.items():
        for hidden in (576, 4096, 8192):
            for center in (False, True):
                yield from _configurations(dtype, name, next_power_of_2(hidden), center)


def _configurations(dtype, name, block, center):
    p, f = f"*{name}", "*fp32"
    architectures = BFLOAT16 if dtype is torch.bfloat16 else ARCHITECTURES
    if block < LONGEST:
        architectures = architectures[:: len(architectures) - 1]
    yield Configuration(
        _forward,
        {
            "x": p, "residual": p, "weight": p, "bias": p, "y": p, "total": p, "mean": f,
            "rstd": f, "x_stride": "i64", "residual_stride": "i64", "hidden": "i32",
            "eps": "fp32", "offset": "fp32",
        },
        {
            "CENTER": center, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": center,
            "BLOCK": block,
        },
        warps_for(block), architectures=architectures, multiples=MULTIPLES,
        label=f"{name} {block}",
    )  # fmt: skip
    yield Configuration(
        _backward,
        {
            "dy": p, "dtotal": p, "x": p, "weight": p, "mean": f, "rstd": f, "dx": p,
            "dweight": f, "dbias": f, "dy_stride": "i64", "dtotal_stride": "i64",
            "x_stride": "i64", "rows": "i32", "hidden": "i32", "offset": "fp32",
        },
        {
            "CENTER": center, "HAS_DTOTAL": True, "HAS_WEIGHT": True, "WEIGHT_GRAD": True,
            "BIAS_GRAD": center, "BLOCK": block,
        },
        warps_for(block), architectures=architectures, stack=8 if block == LONGEST else 0,
        multiples=MULTIPLES, aligned_stack=16 if block == LONGEST else 8,
        label=f"{name} {block}",
    )  # fmt: skip
