"""The thin products of low-rank adapters: the wide matrix is read once, and multiplied in float32.

Products are float32 on float32 ("ieee", not TF32), as the reference's are; the rank is padded to a
power of two of at least 16. keep_scale multiplies every kept element alike, so it joins `scale`.

The sum over tokens is split over row groups, whose partial sums are added afterwards in the same
order always: no atomics.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    ARCHITECTURES,
    NAMES,
    Configuration,
    next_power_of_2,
    on_device,
    processors,
)

# Beyond it a GEMM library is faster, and a tile of the narrow side no longer fits the registers.
LARGEST_RANK = 64


@triton.jit
def _matrix_tile(matrix, mask, stride, columns, row, column, inside, HAS_MASK: tl.constexpr):
    """A tile of the matrix in float32, its dropped elements zero."""
    tile = tl.load(matrix + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    if HAS_MASK:
        kept = tl.load(mask + row[:, None] * columns + column[None, :], mask=inside, other=0)
        # A product, not a choice: a dropped NaN stays NaN, as in the reference.
        tile = tile.to(tl.float32) * kept.to(tl.float32)
    return tile.to(tl.float32)


@triton.jit
def _dot(
    matrix, wide, mask, out, matrix_stride, rank_stride, column_stride, rows, columns, rank, scale,
    HAS_MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    each = tl.arange(0, RANK)
    total = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        tile = _matrix_tile(matrix, mask, matrix_stride, columns, row, column, inside, HAS_MASK)
        factor = tl.load(
            wide + each[None, :] * rank_stride + column[:, None] * column_stride,
            mask=(each[None, :] < rank) & (column[:, None] < columns),
            other=0.0,
        )
        total = tl.dot(tile, factor.to(tl.float32), total, input_precision="ieee")
    place = out + row[:, None] * rank + each[None, :]
    tl.store(place, total * scale, mask=(row[:, None] < rows) & (each[None, :] < rank))


@triton.jit
def _sum(
    matrix, narrow, mask, out, matrix_stride, narrow_stride, rows, columns, rank, scale,
    HAS_MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    each = tl.arange(0, RANK)
    total = tl.zeros([RANK, COLUMNS], tl.float32)
    for start in range(group * ROWS, rows, tl.num_programs(1) * ROWS):
        row = tl.full([], 0, tl.int64) + start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        tile = _matrix_tile(matrix, mask, matrix_stride, columns, row, column, inside, HAS_MASK)
        factor = tl.load(
            narrow + row[None, :] * narrow_stride + each[:, None],
            mask=(each[:, None] < rank) & (row[None, :] < rows),
            other=0.0,
        )
        total = tl.dot(factor.to(tl.float32), tile, total, input_precision="ieee")
    place = out + (group.to(tl.int64) * rank + each[:, None]) * columns + column[None, :]
    tl.store(place, total * scale, mask=(each[:, None] < rank) & (column[None, :] < columns))


@triton.jit
def _add(
    matrix, narrow, wide, mask, matrix_stride, narrow_stride, rank_stride, column_stride,
    rows, columns, rank, scale,
    HAS_MASK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    added = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANK):
        each = start + tl.arange(0, RANK)
        left = tl.load(
            narrow + row[:, None] * narrow_stride + each[None, :],
            mask=(row[:, None] < rows) & (each[None, :] < rank),
            other=0.0,
        )
        right = tl.load(
            wide + each[:, None] * rank_stride + column[None, :] * column_stride,
            mask=(each[:, None] < rank) & (column[None, :] < columns),
            other=0.0,
        )
        added = tl.dot(left.to(tl.float32), right.to(tl.float32), added, input_precision="ieee")
    added *= scale
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    if HAS_MASK:
        kept = tl.load(mask + row[:, None] * columns + column[None, :], mask=inside, other=0)
        added *= kept.to(tl.float32)
    place = matrix + row[:, None] * matrix_stride + column[None, :]
    old = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (old.to(tl.float32) + added).to(old.dtype), mask=inside)


def _tile(kernel, rank_block: int) -> dict[str, int]:
    """Sizes of one program, such that its sums and operands stay in registers at every rank."""
    if kernel is _add:
        # Ranks in blocks: an unrolled product over all of 64 spills.
        return {"RANK": 16, "ROWS": 32, "COLUMNS": 64}
    side = 16 if rank_block == LARGEST_RANK else 32
    rows, columns = (side, 32) if kernel is _dot else (16, 2 * side)
    return {"RANK": rank_block, "ROWS": rows, "COLUMNS": columns}


def _sizes(kernel, rank: int) -> dict[str, int]:
    if rank > LARGEST_RANK:
        raise ValueError(f"rank: expected up to {LARGEST_RANK} on CUDA, got {rank}")
    return _tile(kernel, max(16, next_power_of_2(rank)))


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def low_rank_dot(matrix, wide, mask, keep_scale, scale):
    (rows, columns), rank = matrix.shape, wide.shape[0]
    out = matrix.new_empty(rows, rank, dtype=torch.float32)
    size = _sizes(_dot, rank)
    if out.numel():
        with on_device(matrix):
            _dot[(triton.cdiv(rows, size["ROWS"]),)](
                matrix, wide, _bytes(mask), out, matrix.stride(0), wide.stride(0), wide.stride(1),
                rows, columns, rank, scale * (1.0 if mask is None else keep_scale),
                HAS_MASK=mask is not None, **size, num_warps=4,
            )  # fmt: skip
    return out


def low_rank_sum(matrix, narrow, mask, keep_scale, scale):
    (rows, columns), rank = matrix.shape, narrow.shape[1]
    size = _sizes(_sum, rank)
    blocks = triton.cdiv(columns, size["COLUMNS"])
    # Few columns leave processors idle unless the rows are shared out too.
    groups = min(triton.cdiv(rows, size["ROWS"]), triton.cdiv(4 * processors(matrix), blocks or 1))
    partial = matrix.new_empty(max(groups, 1), rank, columns, dtype=torch.float32)
    if partial.numel():
        with on_device(matrix):
            _sum[(blocks, partial.shape[0])](
                matrix, narrow, _bytes(mask), partial, matrix.stride(0), narrow.stride(0),
                rows, columns, rank, scale * (1.0 if mask is None else keep_scale),
                HAS_MASK=mask is not None, **size, num_warps=4,
            )  # fmt: skip
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def low_rank_add_(matrix, narrow, wide, mask, keep_scale, scale):
    (rows, columns), rank = matrix.shape, narrow.shape[1]
    size = _sizes(_add, rank)
    if not matrix.numel() or not rank:
        return
    with on_device(matrix):
        _add[(triton.cdiv(rows, size["ROWS"]), triton.cdiv(columns, size["COLUMNS"]))](
            matrix, narrow, wide, _bytes(mask), matrix.stride(0), narrow.stride(0),
            wide.stride(0), wide.stride(1), rows, columns, rank,
            scale * (1.0 if mask is None else keep_scale),
            HAS_MASK=mask is not None, **size, num_warps=4,
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    # Unmasked forms need less; each size of tile occurs with the widest elements.
    for kernel in (_dot, _sum, _add):
        for block in (16, LARGEST_RANK) if kernel is not _add else (16,):
            yield _configuration(torch.float32, kernel, block, (75, 80, 90, 120))
            yield _configuration(torch.bfloat16, kernel, block, (80, 90))
        yield _configuration(torch.float32, kernel, 32, (80,))
        yield _configuration(torch.float16, kernel, 32, ARCHITECTURES)


def _configuration(dtype, kernel, block, architectures) -> Configuration:
    name = NAMES[dtype]
    types = {
        "matrix": f"*{name}", "narrow": "*fp32", "wide": "*fp32", "mask": "*u8", "out": "*fp32",
        "matrix_stride": "i64", "narrow_stride": "i64", "rank_stride": "i64",
        "column_stride": "i64", "rows": "i32", "columns": "i32", "rank": "i32", "scale": "fp32",
    }  # fmt: skip
    return Configuration(
        kernel,
        {argument: types[argument] for argument in kernel.arg_names if argument in types},
        {"HAS_MASK": True, **_tile(kernel, block)},
        architectures=architectures,
        multiples=("matrix_stride", "columns"),
        label=f"{name} rank {block}",
    )
