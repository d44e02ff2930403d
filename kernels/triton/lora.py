"""AN EXPERIMENT, registered nowhere: a linear layer and its adapter as one product.

    y = x W^T + bias + s (x A^T) B^T

x A^T is summed in the loop that sums x W^T, from the tiles of x already at hand, and the rank's
part is added before y is written: x is read once and y written once. Against that stands a GEMM
library's product, which is faster than Triton's, beside the kernels of low_rank. Only a GPU can
tell which wins, none has yet, and until then `lora` takes the library's. By its strides the kernel
also serves dX = dY W + U A with U = s dY B.

In half types and for rows that begin at multiples of 16 elements only: without, Triton cannot load
16 bytes at once and the registers run over. Adapters wider than x are split into
parts of x's dtype whose sum they are, bit for bit in bfloat16, as rows of one larger rank.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Configuration, capability, next_power_of_2, on_device

LARGEST_RANK = 64
WARPS, STAGES = 8, 3
GROUP = 8  # blocks of rows that share the tiles of W while a cache holds them


@triton.jit
def _product(
    x, weight, bias, a, b, y, xa, x_stride, weight_out, weight_in, a_rank, a_in, b_out, b_rank,
    rows, columns, depth, rank, scale,
    HAS_BIAS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = tl.program_id(0) % (GROUP * column_blocks)
    row = ((first + within % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column_block = within // height
    column = (column_block * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    each = tl.arange(0, RANK)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    low = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        there = inner < depth
        left = tl.load(
            x + row[:, None] * x_stride + inner[None, :],
            mask=(row[:, None] < rows) & there[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + column[None, :] * weight_out + inner[:, None] * weight_in,
            mask=(column[None, :] < columns) & there[:, None],
            other=0.0,
        )
        down = tl.load(
            a + each[None, :] * a_rank + inner[:, None] * a_in,
            mask=(each[None, :] < rank) & there[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total)
        low = tl.dot(left, down, low)
    up = tl.load(
        b + column[None, :] * b_out + each[:, None] * b_rank,
        mask=(column[None, :] < columns) & (each[:, None] < rank),
        other=0.0,
    )
    # On tensor cores, each factor in two parts: what is lost lies 2^-16 below, beyond y's bits.
    scaled = low * scale
    high = scaled.to(x.dtype.element_ty)
    up_high = up.to(x.dtype.element_ty)
    total = tl.dot(high, up_high, total)
    total = tl.dot((scaled - high.to(tl.float32)).to(x.dtype.element_ty), up_high, total)
    if up.dtype == tl.float32:
        total = tl.dot(high, (up - up_high.to(tl.float32)).to(x.dtype.element_ty), total)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(y + row[:, None] * columns + column[None, :], total.to(y.dtype.element_ty), inside)
    if column_block == 0:
        thin = (row[:, None] < rows) & (each[None, :] < rank)
        tl.store(xa + row[:, None] * rank + each[None, :], low, mask=thin)


def _tile(target: int, rank_block: int) -> dict[str, int]:
    """Sizes of one program: what stays within registers, and 100 KB of shared memory."""
    wide = target in (90, 100) or rank_block == 16
    return {"ROWS": 128, "COLUMNS": 128 if wide else 64, "DEPTH": 64}


def _parts(a: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of dtype whose sum is a: three hold the 24 bits of a float32."""
    parts = []
    while len(parts) < (3 if a.dtype is torch.float32 else 1):
        parts.append(a.to(dtype))
        a = a - parts[-1].to(a.dtype)
    return parts


def lora_product(
    x: Tensor,  # (rows, in), bfloat16 or float16
    weight: Tensor,  # (out, in) of any strides
    bias: Tensor | None,  # (out,)
    a: Tensor,  # (rank, in), x's dtype or float32
    b: Tensor,  # (out, rank)
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (rows, out), and x A^T (rows, rank) in float32 for the backward."""
    (rows, depth), columns = x.shape, weight.shape[0]
    parts = _parts(a, x.dtype)
    stacked, repeated = torch.cat(parts), b.repeat(1, len(parts))
    rank = stacked.shape[0]
    if rank > LARGEST_RANK or not rank:
        raise ValueError(f"a: expected 1 to {LARGEST_RANK // len(parts)} rows, got {a.shape[0]}")
    if depth % 16 or columns % 16 or x.stride(1) != 1 or x.stride(0) % 16:
        raise ValueError(f"x, weight: expected multiples of 16, got {x.stride()}, {weight.shape}")
    y = x.new_empty(rows, columns)
    xa = x.new_empty(rows, rank, dtype=torch.float32)
    block = max(16, next_power_of_2(rank))
    size = _tile(capability(x), block)
    if y.numel():
        programs = triton.cdiv(rows, size["ROWS"]) * triton.cdiv(columns, size["COLUMNS"])
        with on_device(x):
            _product[(programs,)](
                x, weight, bias, stacked, repeated, y, xa, x.stride(0), *weight.stride(),
                *stacked.stride(), *repeated.stride(), rows, columns, depth, rank, scale,
                HAS_BIAS=bias is not None, RANK=block, **size, GROUP=GROUP, num_warps=WARPS,
                num_stages=STAGES,
            )  # fmt: skip
    return y, xa.view(rows, len(parts), a.shape[0]).sum(1)


def configurations() -> Iterator[Configuration]:
    multiples = ("x_stride", "weight_out", "a_rank", "columns", "depth")
    for adapter in ("bf16", "fp32"):
        for block, target in product((16, 32, LARGEST_RANK), (80, 90, 100, 120)):
            yield Configuration(
                _product,
                {
                    **dict.fromkeys(("x", "weight", "bias", "a", "y"), "*bf16"),
                    "b": f"*{adapter}", "xa": "*fp32", **dict.fromkeys(multiples, "i32"),
                    **dict.fromkeys(("b_out", "rows", "rank"), "i32"), "scale": "fp32",
                },
                {
                    **dict.fromkeys(("weight_in", "a_in", "b_rank"), 1), "HAS_BIAS": True,
                    "RANK": block, **_tile(target, block), "GROUP": GROUP,
                },
                WARPS, STAGES, (target,), stack=None, multiples=multiples,
                label=f"bf16 {adapter} rank {block}",
            )  # fmt: skip
