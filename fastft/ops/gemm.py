"""gemm: the dense matrix products of the CPU operators, on the faster of PyTorch's libraries.

PyTorch sends float32 products to MKL, which keeps to 256-bit code on processors that are not
Intel's; oneDNN, which PyTorch also ships, uses the full width there (measured on two cores of a
Zen 5: 205 against 470 GFLOP/s). The choice depends on the processor and the shape alone, so the
same inputs give the same bits from run to run.
"""

import torch
from torch import Tensor

from fastft.library import extension

# oneDNN's set-up costs more than it saves below about 2^21 multiply-adds (two cores of a Zen 5:
# 0.81 of MKL's speed at 2^20, 1.09 at 2^21, 1.42 at 2^22); twice that is on the safe side.
_WORTHWHILE = 1 << 22


def _prefers_onednn() -> bool:
    return (
        extension is not None
        and not extension.build_info()["intel"]
        and extension.build_info()["instruction_set"].startswith("avx512")
        and torch.backends.mkldnn.is_available()
    )


_ONEDNN = _prefers_onednn()


def float32_library() -> str:
    """Which library large float32 products on the CPU go to: "oneDNN" or "PyTorch's default"."""
    return "oneDNN" if _ONEDNN else "PyTorch's default"


def uses_onednn(rows: int, w: Tensor, x: Tensor) -> bool:
    """Whether the product of x, taken as (rows, in), and w, (in, out), goes to oneDNN."""
    return (
        _ONEDNN
        and x.dtype is torch.float32
        and w.dtype is torch.float32
        and x.is_cpu
        and rows * w.shape[0] * w.shape[1] >= _WORTHWHILE
        and rows >= 8
        and bool(torch.backends.mkldnn.enabled)
    )


def matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w + bias for x: (rows, in), w: (in, out) of any strides, bias: (out,)."""
    if uses_onednn(x.shape[0], w, x):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, w.t(), bias, "none", [], "")
        return out
    return torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)


def add_matmul(total: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """total + x w as a new tensor, total: (rows, out); one pass where the library fuses it."""
    if uses_onednn(x.shape[0], w, x) and total.is_contiguous():
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, total, w.t(), None, "add")
        return out
    return torch.addmm(total, x, w)


def add_product_(total: Tensor, x: Tensor, w: Tensor, scale: float = 1.0) -> None:
    """total += scale * x w in place, total of a dtype as wide as x's and w's, or wider."""
    if x.is_cuda and x.dtype is w.dtype and x.dtype is not total.dtype:
        # On tensor cores in x's dtype, whose products are exact in float32; nothing is copied.
        torch.addmm(total, x, w, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.addmm_(x.to(total.dtype), w.to(total.dtype), alpha=scale)
