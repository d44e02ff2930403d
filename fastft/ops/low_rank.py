"""low_rank: the thin products of low-rank adapters; a wide matrix (tokens, columns) is read once.

    low_rank_dot    out = scale * M wide^T             (tokens, rank)
    low_rank_sum    out = scale * narrow^T M           (rank, columns)
    low_rank_add_   matrix += scale * D narrow wide    in place, over a private buffer only

with M = matrix * mask * keep_scale under dropout (D likewise on the added part), and M = matrix
without. Sums are float32 whatever the matrix's dtype. At rank 8 a GEMM library takes 2.5 times as
long or more; above `_GEMM_RANK` one is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastft.library import Operator, implement_in_triton, operator
from fastft.ops import gemm

# On two cores, 512 x 576 in float32, the three kernels together take 1/1.9 of a GEMM library's time
# at rank 64, 1/1.6 at 96 and 1/0.8 at 128; the Triton kernels take ranks up to 64.
_GEMM_RANK = 64


def wide_dtype(matrix: Tensor) -> torch.dtype:
    """float32, in which the low-rank part is computed; float64 stays."""
    return torch.promote_types(matrix.dtype, torch.float32)


def _masked(matrix: Tensor, mask: Tensor | None, keep_scale: float) -> Tensor:
    wide = matrix.to(wide_dtype(matrix))
    return wide if mask is None else wide * mask * keep_scale


@operator(
    "low_rank_dot(Tensor matrix, Tensor wide, Tensor? mask, float keep_scale, float scale)"
    " -> Tensor"
)
def _low_rank_dot(
    matrix: Tensor, wide: Tensor, mask: Tensor | None, keep_scale: float, scale: float
) -> Tensor:
    m = _masked(matrix, mask, keep_scale)
    return (gemm.matmul(m, wide.to(m.dtype).t()) * scale).contiguous()


@operator(
    "low_rank_sum(Tensor matrix, Tensor narrow, Tensor? mask, float keep_scale, float scale)"
    " -> Tensor"
)
def _low_rank_sum(
    matrix: Tensor, narrow: Tensor, mask: Tensor | None, keep_scale: float, scale: float
) -> Tensor:
    m = _masked(matrix, mask, keep_scale)
    return (gemm.matmul(narrow.t(), m) * scale).contiguous()


@operator(
    "low_rank_add_(Tensor(a!) matrix, Tensor narrow, Tensor wide, Tensor? mask, float keep_scale,"
    " float scale) -> ()"
)
def _low_rank_add_(
    matrix: Tensor,
    narrow: Tensor,
    wide: Tensor,
    mask: Tensor | None,
    keep_scale: float,
    scale: float,
) -> None:
    added = gemm.matmul(narrow, wide.to(narrow.dtype)) * scale
    if mask is not None:
        added = added * mask * keep_scale
    matrix.copy_(matrix.to(added.dtype) + added)


implement_in_triton("low_rank", _low_rank_dot, _low_rank_sum, _low_rank_add_)


def _chosen(operator: Operator[..., Any], rank: int) -> Callable[..., Tensor]:
    """The thin kernel, or above `_GEMM_RANK` the reference, which like it knows no autocast."""
    if rank <= _GEMM_RANK:
        return operator

    def reference(matrix: Tensor, *args: Any) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            out: Tensor = operator.reference(matrix, *args)
            return out

    return reference


def low_rank_dot(
    matrix: Tensor,
    wide: Tensor,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """scale * (matrix * mask * keep_scale) wide^T: (tokens, rank), for wide (rank, columns)."""
    return _chosen(_low_rank_dot, wide.shape[0])(matrix, wide, mask, keep_scale, scale)


def low_rank_sum(
    matrix: Tensor,
    narrow: Tensor,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """scale * narrow^T (matrix * mask * keep_scale), narrow (tokens, rank): (rank, columns)."""
    return _chosen(_low_rank_sum, narrow.shape[1])(matrix, narrow, mask, keep_scale, scale)


def low_rank_add_(
    matrix: Tensor,
    narrow: Tensor,
    wide: Tensor,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    scale: float = 1.0,
) -> None:
    """matrix += scale * (narrow wide) * mask * keep_scale, in place."""
    _chosen(_low_rank_add_, narrow.shape[1])(matrix, narrow, wide, mask, keep_scale, scale)
