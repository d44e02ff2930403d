"""The passes around a product of integers: rounding rows to int8, and scaling its sums in place.

A program takes one row in blocks: the largest size first, then the numbers, read a second time from
the cache.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .common import (
    ARCHITECTURES,
    BFLOAT16,
    NAMES,
    Configuration,
    next_power_of_2,
    on_device,
    warps_for,
)

LONGEST = 4096  # columns of a block


@triton.jit
def _value(x, factors, row, stride, columns, inside, HAS_FACTORS: tl.constexpr):
    value = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        value *= tl.load(factors + columns, mask=inside, other=0.0)
    return value


@triton.jit
def _round(
    x, factors, values, scale, stride, width,
    HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _value(x, factors, row, stride, columns, columns < width, HAS_FACTORS)
        most = tl.maximum(most, tl.abs(value))
        bad += value * 0.0
    peak, nan = tl.max(most, 0), tl.sum(bad, 0)
    # Below, 127 / peak would be infinite; NaN is not equal to 0.
    some = (peak > 127.0 * 1.17549435e-38) & (nan == 0.0)
    safe = tl.where(some, peak, 1.0)
    tl.store(scale + row, tl.where(some, tl.div_rn(safe, 127.0), 0.0) + nan)
    inverse = tl.where(some, tl.div_rn(127.0, safe), 0.0)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _value(x, factors, row, stride, columns, columns < width, HAS_FACTORS)
        # Adding 1.5 * 2^23 rounds to the nearest integer, the even one of two.
        rounded = tl.where(some, value, 0.0) * inverse + 12582912.0 - 12582912.0
        tl.store(values + row * width + columns, rounded.to(tl.int8), mask=columns < width)


@triton.jit
def _scale(
    sums, a_scale, b_scale, bias, total, total_stride, width, pieces,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = sums + row * width + columns
    y = tl.load(place, mask=inside, other=0).to(tl.float32) * tl.load(a_scale + row)
    if HAS_SCALE:
        y *= tl.load(b_scale + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=inside, other=0.0)
    if HAS_TOTAL:
        y += tl.load(total + row * total_stride + columns, mask=inside, other=0.0)
    tl.store(place, y.to(tl.int32, bitcast=True), mask=inside)


def round_rows(x, factors):
    rows, width = x.shape
    values = x.new_empty(rows, width, dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    block = min(LONGEST, next_power_of_2(width))
    if rows:
        with on_device(x):
            _round[(rows,)](
                x, factors, values, scale, x.stride(0), width,
                HAS_FACTORS=factors is not None, BLOCK=block, num_warps=warps_for(block),
            )  # fmt: skip
    return values, scale


def scale_sums_(sums, a_scale, b_scale, bias, total):
    rows, width = sums.shape
    block = min(LONGEST, next_power_of_2(width))
    pieces = triton.cdiv(width, block)
    if sums.numel():
        with on_device(sums):
            _scale[(rows * pieces,)](
                sums, a_scale, b_scale, bias, total, 0 if total is None else total.stride(0),
                width, pieces, HAS_SCALE=b_scale is not None, HAS_BIAS=bias is not None,
                HAS_TOTAL=total is not None, BLOCK=block, num_warps=warps_for(block),
            )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    f = "*fp32"
    for block in (1024, LONGEST):
        for dtype, name in NAMES.items():
            yield Configuration(
                _round,
                {"x": f"*{name}", "factors": f, "values": "*i8", "scale": f, "stride": "i64",
                 "width": "i32"},
                {"HAS_FACTORS": True, "BLOCK": block}, warps_for(block),
                architectures=BFLOAT16 if dtype is torch.bfloat16 else ARCHITECTURES,
                multiples=("stride", "width"), label=f"{name} {block}",
            )  # fmt: skip
        yield Configuration(
            _scale,
            {"sums": "*i32", "a_scale": f, "b_scale": f, "bias": f, "total": f,
             "total_stride": "i64", "width": "i32", "pieces": "i32"},
            {"HAS_SCALE": True, "HAS_BIAS": True, "HAS_TOTAL": True, "BLOCK": block},
            warps_for(block), multiples=("total_stride", "width"), label=f"{block}",
        )  # fmt: skip
