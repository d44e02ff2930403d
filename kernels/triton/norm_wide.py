"""RMSNorm and LayerNorm of rows too long for one program's registers: taken a block at a time.

A row is read again for each of its sums, from the cache that the first read has filled. Gradients
of weight and bias have a kernel of their own, a block of columns to each program.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .common import ARCHITECTURES, NAMES, Configuration, on_device, processors

BLOCK = 4096
WARPS = 8
COLUMNS = 1024  # of a program that sums over rows


@triton.jit
def _total(x, residual, start, hidden, like, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the row that is normalised, as stored: rounded to the dtype of `like`."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
        value = value.to(like.dtype.element_ty).to(tl.float32)
    return columns, inside, value


@triton.jit
def _forward(
    x, residual, weight, bias, y, total, mean, rstd,
    x_stride, residual_stride, hidden, eps, offset,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if HAS_RESIDUAL:
        residual += row * residual_stride
        total += row * hidden
    y += row * hidden
    average = 0.0
    if CENTER:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, hidden, BLOCK):
            _, _, value = _total(x, residual, start, hidden, y, HAS_RESIDUAL, BLOCK)
            sums += value
        average = tl.sum(sums, 0) / hidden
        tl.store(mean + row, average)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        columns, inside, value = _total(x, residual, start, hidden, y, HAS_RESIDUAL, BLOCK)
        if HAS_RESIDUAL:
            tl.store(total + columns, value.to(total.dtype.element_ty), mask=inside)
        value = tl.where(inside, value - average, 0.0)
        squares += value * value
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / hidden + eps)
    tl.store(rstd + row, scale)
    for start in range(0, hidden, BLOCK):
        columns, inside, value = _total(x, residual, start, hidden, y, HAS_RESIDUAL, BLOCK)
        value = (value - average) * scale
        if HAS_WEIGHT:
            value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
        if HAS_BIAS:
            value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + columns, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scaled(
    dy, x, weight, start, hidden, average, scale, offset,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of m = dy * weight and of the normalised row, both 0 beyond its end."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < hidden
    grad = tl.load(dy + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        grad *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset
    value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    return columns, inside, grad, tl.where(inside, (value - average) * scale, 0.0)


@triton.jit
def _backward(
    dy, dtotal, x, weight, mean, rstd, dx, dy_stride, dtotal_stride, x_stride, hidden, offset,
    CENTER: tl.constexpr, HAS_DTOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy += row * dy_stride
    x += row * x_stride
    scale = tl.load(rstd + row)
    average = tl.load(mean + row) if CENTER else 0.0
    products = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        _, _, grad, normalised = _scaled(
            dy, x, weight, start, hidden, average, scale, offset, HAS_WEIGHT, BLOCK
        )
        products += grad * normalised
        if CENTER:
            sums += grad
    along = tl.sum(products, 0) / hidden
    even = tl.sum(sums, 0) / hidden
    for start in range(0, hidden, BLOCK):
        columns, inside, grad, normalised = _scaled(
            dy, x, weight, start, hidden, average, scale, offset, HAS_WEIGHT, BLOCK
        )
        out = (grad - even - normalised * along) * scale
        if HAS_DTOTAL:
            other = tl.load(dtotal + row * dtotal_stride + columns, mask=inside, other=0.0)
            out += other.to(tl.float32)
        tl.store(dx + row * hidden + columns, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _sums(
    dy, x, mean, rstd, dweight, dbias, dy_stride, x_stride, rows, hidden,
    CENTER: tl.constexpr, WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias of one block of columns, over every groups-th row."""
    group = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < hidden
    weights = tl.zeros([COLUMNS], tl.float32)
    biases = tl.zeros([COLUMNS], tl.float32)
    for index in range(group, rows, tl.num_programs(1)):
        row = tl.full([], 0, tl.int64) + index
        grad = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT_GRAD:
            value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            if CENTER:
                value -= tl.load(mean + row)
            weights += grad * (value * tl.load(rstd + row))
        if BIAS_GRAD:
            biases += grad
    place = group.to(tl.int64) * hidden + columns
    if WEIGHT_GRAD:
        tl.store(dweight + place, weights, mask=inside)
    if BIAS_GRAD:
        tl.store(dbias + place, biases, mask=inside)


def normalise(x, residual, weight, bias, out, eps, offset, center):
    """Fills out: y, total, mean, rstd."""
    rows, hidden = x.shape
    if rows:
        with on_device(x):
            _forward[(rows,)](
                x, residual, weight, bias, *out,
                x.stride(0), 0 if residual is None else residual.stride(0), hidden, eps, offset,
                CENTER=center, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


def gradients(dy, dtotal, x, weight, mean, rstd, dx, offset, weight_grad, bias_grad):
    """Fills dx; gives the partial sums of dweight and dbias, a row each."""
    rows, hidden = x.shape
    blocks = triton.cdiv(hidden, COLUMNS)
    groups = max(1, min(rows, triton.cdiv(4 * processors(x), blocks)))
    partial = [
        x.new_empty(groups if needed else 0, hidden, dtype=torch.float32)
        for needed in (weight_grad, bias_grad)
    ]
    with on_device(x):
        if rows:
            _backward[(rows,)](
                dy, dtotal, x, weight, mean, rstd, dx,
                dy.stride(0), 0 if dtotal is None else dtotal.stride(0), x.stride(0), hidden,
                offset, CENTER=mean is not None, HAS_DTOTAL=dtotal is not None,
                HAS_WEIGHT=weight is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        if weight_grad or bias_grad:
            _sums[(blocks, groups)](
                dy, x, mean, rstd, *partial, dy.stride(0), x.stride(0), rows, hidden,
                CENTER=mean is not None, WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad,
                COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
    return partial


def configurations() -> Iterator[Configuration]:
    ends = {torch.float32: ARCHITECTURES, torch.bfloat16: (80, 120), torch.float16: (75, 120)}
    for dtype, name in NAMES.items():
        # RMSNorm's kernels are a part of LayerNorm's.
        for center in (False, True) if dtype is torch.bfloat16 else (True,):
            p, f = f"*{name}", "*fp32"
            tensors = dict.fromkeys(("x", "residual", "weight", "bias", "y", "total"), p)
            tensors |= dict.fromkeys(("dy", "dtotal", "dx"), p)
            tensors |= dict.fromkeys(("mean", "rstd", "dweight", "dbias"), f)
            strides = ("x_stride", "residual_stride", "dy_stride", "dtotal_stride")
            numbers = dict.fromkeys(strides, "i64") | {"rows": "i32", "hidden": "i32"}
            numbers |= {"eps": "fp32", "offset": "fp32"}
            flags = ("HAS_RESIDUAL", "HAS_WEIGHT", "HAS_DTOTAL", "WEIGHT_GRAD")
            constants = dict.fromkeys(flags, True) | {"BLOCK": BLOCK, "COLUMNS": COLUMNS}
            constants |= dict.fromkeys(("CENTER", "HAS_BIAS", "BIAS_GRAD"), center)
            for kernel, warps in ((_forward, WARPS), (_backward, WARPS), (_sums, 4)):
                yield Configuration(
                    kernel,
                    {n: t for n, t in (tensors | numbers).items() if n in kernel.arg_names},
                    {n: c for n, c in constants.items() if n in kernel.arg_names},
                    warps,
                    architectures=ends[dtype],
                    multiples=(*strides, "hidden"),
                    label=name,
                )
