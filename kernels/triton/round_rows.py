"""Rounding rows to numbers of eight bits, int8 or e4m3, with a scale each.

A program takes one row in blocks: the largest size first, then the numbers, read a second time from
the cache. The bits of e4m3 are made by integer arithmetic: every architecture has it, and Triton's
interpreter computes it as GPUs do, which cannot be said of its casts to eight bits.
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
def _int8(value):
    # Adding 1.5 * 2^23 rounds to the nearest integer, the even one of two.
    return (value + 12582912.0 - 12582912.0).to(tl.int8)


@triton.jit
def _e4m3(value):
    """The bits of the nearest numbers, the even one of two, of values up to 448."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 3 of 23 digits are left, rounded by what is added; it may carry into the exponent, whose bias
    # goes from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are 2^-9, as those of float32 are above 2^14.
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _round(
    x, factors, values, scale, stride, width,
    HAS_FACTORS: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    LARGEST: tl.constexpr = 448.0 if FP8 else 127.0
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _value(x, factors, row, stride, columns, columns < width, HAS_FACTORS)
        most = tl.maximum(most, tl.abs(value))
        bad += value * 0.0
    peak, nan = tl.max(most, 0), tl.sum(bad, 0)
    # Below, LARGEST / peak would be infinite; NaN is not equal to 0.
    some = (peak > LARGEST * 1.17549435e-38) & (nan == 0.0)
    safe = tl.where(some, peak, 1.0)
    tl.store(scale + row, tl.where(some, tl.div_rn(safe, LARGEST), 0.0) + nan)
    inverse = tl.where(some, tl.div_rn(LARGEST, safe), 0.0)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _value(x, factors, row, stride, columns, columns < width, HAS_FACTORS)
        value = tl.where(some, value, 0.0) * inverse
        rounded = _e4m3(value) if FP8 else _int8(value)
        tl.store(values + row * width + columns, rounded, mask=columns < width)


def _launch(x, factors, fp8):
    rows, width = x.shape
    values = x.new_empty(rows, width, dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    block = min(LONGEST, next_power_of_2(width))
    if rows:
        with on_device(x):
            _round[(rows,)](
                x, factors, values, scale, x.stride(0), width,
                HAS_FACTORS=factors is not None, FP8=fp8, BLOCK=block, num_warps=warps_for(block),
            )  # fmt: skip
    return values, scale


def round_rows(x, factors):
    return _launch(x, factors, False)


def round_rows_fp8(x, factors):
    values, scale = _launch(x, factors, True)
    return values.view(torch.float8_e4m3fn), scale


def configurations() -> Iterator[Configuration]:
    f = "*fp32"
    for block in (1024, LONGEST):
        for fp8 in (False, True):
            for dtype, name in NAMES.items():
                yield Configuration(
                    _round,
                    {"x": f"*{name}", "factors": f, "values": "*i8", "scale": f, "stride": "i64",
                     "width": "i32"},
                    {"HAS_FACTORS": True, "FP8": fp8, "BLOCK": block}, warps_for(block),
                    architectures=BFLOAT16 if dtype is torch.bfloat16 else ARCHITECTURES,
                    multiples=("stride", "width"), label=f"{name} {block}" + " e4m3" * fp8,
                )  # fmt: skip
