"""Scaling a product's sums of integers in place, over the sums themselves."""

from collections.abc import Iterator

import triton
import triton.language as tl

from .common import Configuration, next_power_of_2, on_device, warps_for

LONGEST = 4096  # columns of a block


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
        yield Configuration(
            _scale,
            {"sums": "*i32", "a_scale": f, "b_scale": f, "bias": f, "total": f,
             "total_stride": "i64", "width": "i32", "pieces": "i32"},
            {"HAS_SCALE": True, "HAS_BIAS": True, "HAS_TOTAL": True, "BLOCK": block},
            warps_for(block), multiples=("total_stride", "width"), label=f"{block}",
        )  # fmt: skip
