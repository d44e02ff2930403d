"""round_rows: a matrix as numbers of eight bits with a float32 scale per row.

    scale = peak / largest      values = round(x factors / scale)      peak: the row's largest size

    round_rows        int8 in [-127, 127]
    round_rows_fp8    e4m3 (torch.float8_e4m3fn) in [-448, 448]

To the nearest number, of two the even one; factors are of the columns. A row of zeros, and one too
small for a normal scale, has scale 0. NaN and infinity make the row's scale NaN and its values 0,
so that what is made of it is NaN. Nothing overflows: the peak becomes the largest number, to within
a rounding of float32, and what is nearest to that is the largest number itself.
"""

import torch
from torch import Tensor

from fastft.library import implement_in_triton, operator

LARGEST_INT8 = 127.0
LARGEST_FP8 = 448.0
FP8 = torch.float8_e4m3fn


def _scaled(x: Tensor, factors: Tensor | None, largest: float) -> tuple[Tensor, Tensor]:
    """x factors / scale, not rounded yet, and the scale (rows,)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide if factors is None else wide * factors
    peak = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))
    nan = (wide * 0).sum(1)
    some = (peak > largest * torch.finfo(torch.float32).tiny) & (nan == 0)
    inverse = torch.where(some, largest / peak, 0)
    scale = (torch.where(some, peak / largest, 0) + nan).float()
    return torch.where(some[:, None], wide * inverse[:, None], 0), scale


@operator("round_rows(Tensor x, Tensor? factors) -> (Tensor values, Tensor scale)")
def _round_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    values, scale = _scaled(x, factors, LARGEST_INT8)
    return values.round().to(torch.int8), scale


@operator("round_rows_fp8(Tensor x, Tensor? factors) -> (Tensor values, Tensor scale)")
def _round_rows_fp8(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    values, scale = _scaled(x, factors, LARGEST_FP8)
    return values.to(FP8), scale


implement_in_triton("round_rows", _round_rows, _round_rows_fp8)
