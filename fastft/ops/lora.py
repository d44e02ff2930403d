"""lora: linear layers with low-rank adapters (arXiv 2106.09685), one or several on one input.

    y_i = x W_i^T + bias_i + s_i D_i(x) A_i^T B_i^T                    D_i: dropout of its own mask

Backward goes through the rank always, never through B A or a full dW of a frozen W:

    U_i  = s_i dY_i B_i                                                (tokens, rank)
    dX   = sum over i of dY_i W_i + D_i(U_i A_i)
    dA_i = U_i^T D_i(x)          dB_i = s_i dY_i^T (D_i(x) A_i^T)

Linears that share an input (query, key, value; gate, up) share its reads and sum dX in place. The
adapters may be of another dtype than the base: PEFT keeps float32 adapters on a half-precision
base. The low-rank part is float32 throughout. Base products go to the device's GEMM library, or
over an int8 weight to the integer products of fastft.ops.int8_linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastft.library import (
    autocast_dtype,
    distinct,
    first_derivatives_only,
    implement,
    operator,
    rows_of,
)
from fastft.ops import gemm
from fastft.ops.base_product import Input, base_input_gradient, base_product
from fastft.ops.low_rank import low_rank_add_, low_rank_dot, low_rank_sum, wide_dtype
from fastft.ops.quantized_linear import QuantizedWeight


@dataclass(frozen=True)
class LoraLinear:
    """One linear layer and its adapter; without a and b, a plain linear layer."""

    weight: Tensor | QuantizedWeight  # (out, in), or (in, out) if transposed (GPT-2's Conv1D)
    bias: Tensor | None = None  # (out,)
    a: Tensor | None = None  # (rank, in)
    b: Tensor | None = None  # (out, rank)
    scale: float = 1.0
    dropout: float = 0.0  # probability in force: 0 in evaluation
    transposed: bool = False


def _shares_products(a: list[Tensor], masks: list[Tensor | None]) -> bool:
    """Without dropout the adapters of one input are one adapter of their joint rank: one read."""
    return len(a) > 1 and all(mask is None for mask in masks)


@operator(
    "lora(Tensor x, Tensor[] weights, Tensor?[] weight_scales, Tensor?[] biases, Tensor[] a,"
    " Tensor[] b, Tensor?[] masks, float[] scales, float[] keep_scales, bool[] transposed)"
    " -> (Tensor[] ys, Tensor[] xas)"
)
def _lora(
    x: Tensor,
    weights: list[Tensor],
    weight_scales: list[Tensor | None],
    biases: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    masks: list[Tensor | None],
    scales: list[float],
    keep_scales: list[float],
    transposed: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    if _shares_products(a, masks):
        joint = low_rank_dot(x, torch.cat([each.to(wide_dtype(each)) for each in a]))
        xas = [part.contiguous() for part in joint.split([each.shape[0] for each in a], 1)]
    else:
        xas = [
            low_rank_dot(x, each, mask, keep)
            for each, mask, keep in zip(a, masks, keep_scales, strict=True)
        ]
    ys, given = [], Input(x)
    for i, weight in enumerate(weights):
        own = (weight, weight_scales[i], biases[i], transposed[i])
        ys.append(base_product(given, *own, xas[i], b[i].t(), scales[i]))
    return ys, xas


@operator(
    "lora_backward_input(Tensor[] dys, Tensor[] weights, Tensor?[] weight_scales, Tensor[] a,"
    " Tensor[] b, Tensor?[] masks, float[] scales, float[] keep_scales, bool[] transposed,"
    " bool input_grad) -> (Tensor dx, Tensor[] us)"
)
def _lora_backward_input(
    dys: list[Tensor],
    weights: list[Tensor],
    weight_scales: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    masks: list[Tensor | None],
    scales: list[float],
    keep_scales: list[float],
    transposed: list[bool],
    input_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    us = [
        low_rank_dot(dy, each.t(), None, 1.0, scale)
        for dy, each, scale in zip(dys, b, scales, strict=True)
    ]
    if not input_grad:
        return dys[0].new_empty(0), us
    dx: Any = None
    for product in zip(dys, weights, weight_scales, transposed, strict=True):
        dx = base_input_gradient(dx, *product)
    if _shares_products(a, masks):
        low_rank_add_(dx, torch.cat(us, 1), torch.cat([each.to(us[0].dtype) for each in a]))
    else:
        for u, each, mask, keep in zip(us, a, masks, keep_scales, strict=True):
            if each.shape[0]:
                low_rank_add_(dx, u, each, mask, keep)
    return dx, us


@operator(
    "lora_backward_adapters(Tensor x, Tensor[] dys, Tensor[] us, Tensor[] xas, Tensor?[] masks,"
    " float[] scales, float[] keep_scales) -> (Tensor[] da, Tensor[] db)"
)
def _lora_backward_adapters(
    x: Tensor,
    dys: list[Tensor],
    us: list[Tensor],
    xas: list[Tensor],
    masks: list[Tensor | None],
    scales: list[float],
    keep_scales: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    if _shares_products(us, masks):
        joint = low_rank_sum(x, torch.cat(us, 1))
        da = [part.clone() for part in joint.split([u.shape[1] for u in us])]
    else:
        da = [
            low_rank_sum(x, u, mask, keep)
            for u, mask, keep in zip(us, masks, keep_scales, strict=True)
        ]
    db = [
        low_rank_sum(dy, xa, None, 1.0, scale).t().contiguous()
        for dy, xa, scale in zip(dys, xas, scales, strict=True)
    ]
    return da, db


# A composition already, whose parts the dispatcher chooses: the same function serves every device.
for _op in (_lora, _lora_backward_input, _lora_backward_adapters):
    implement(_op, "CPU", "C++ and PyTorch's products")(_op.reference)
    implement(_op, "CUDA", "Triton and PyTorch's products")(_op.reference)


@dataclass(frozen=True)
class _Group:
    """What is not a tensor of the linears that share one input."""

    scales: list[float]
    keep_scales: list[float]
    transposed: list[bool]

    @staticmethod
    def of(linears: Sequence[LoraLinear]) -> "_Group":
        return _Group(
            [each.scale for each in linears],
            [1.0 / (1.0 - each.dropout) if each.dropout < 1 else 0.0 for each in linears],
            [each.transposed for each in linears],
        )


def _unflatten(tensors: Sequence[Any], count: int) -> tuple[list[Any], ...]:
    """Six lists of `count` from one flat one: weights, their scales, biases, a, b, masks."""
    return tuple(list(tensors[i * count : (i + 1) * count]) for i in range(6))


@dataclass(frozen=True)
class _Saved:
    """One group of linears on one input, as backward needs it; x may come later than dys."""

    group: _Group
    weights: list[Tensor]
    weight_scales: list[Tensor | None]
    a: list[Tensor]
    b: list[Tensor]
    masks: list[Tensor | None]
    xas: list[Tensor]

    @staticmethod
    def of(group: _Group, tensors: Sequence[Any]) -> "_Saved":
        return _Saved(group, *_unflatten(tensors, len(group.scales)))

    def input_grad(self, dys: list[Tensor], needed: bool) -> tuple[Tensor, list[Tensor]]:
        """dX (tokens, in), and U_i (tokens, rank) for `tensor_grads`."""
        g = self.group
        return _lora_backward_input(
            dys, self.weights, self.weight_scales, self.a, self.b, self.masks,
            g.scales, g.keep_scales, g.transposed, needed,
        )  # fmt: skip

    def tensor_grads(
        self, x: Tensor, dys: list[Tensor], us: list[Tensor], need: Sequence[bool]
    ) -> list[Any]:
        """Gradients of weights, scales, biases, a, b, masks in one list; None where not needed."""
        g, count = self.group, len(dys)
        weights, _, biases, need_a, need_b, _ = _unflatten(need, count)
        none = [None] * count
        da: list[Any] = none
        db: list[Any] = none
        dweights: list[Any] = list(none)
        dbiases: list[Any] = list(none)
        if any(need_a) or any(need_b):
            da, db = _lora_backward_adapters(
                x, dys, us, self.xas, self.masks, g.scales, g.keep_scales
            )
            da = [d.to(p.dtype) if n else None for d, p, n in zip(da, self.a, need_a, strict=True)]
            db = [d.to(p.dtype) if n else None for d, p, n in zip(db, self.b, need_b, strict=True)]
        for i, dy in enumerate(dys):
            if weights[i]:
                pair = (x.t(), dy) if g.transposed[i] else (dy.t(), x)
                dweights[i] = gemm.matmul(*pair)
            if biases[i]:
                dbiases[i] = dy.sum(0)
        return [*dweights, *none, *dbiases, *da, *db, *none]


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: _Group, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # x: (tokens, in)
        weights, weight_scales, biases, a, b, masks = _unflatten(tensors, len(group.scales))
        ys, xas = _lora(
            x, weights, weight_scales, biases, a, b, masks,
            group.scales, group.keep_scales, group.transposed,
        )  # fmt: skip
        ctx.group = group
        ctx.save_for_backward(x, *weights, *weight_scales, *a, *b, *masks, *xas)
        return tuple(ys)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        saved = _Saved.of(ctx.group, tensors)
        rows = [rows_of(dy) for dy in dys]
        dx, us = saved.input_grad(rows, ctx.needs_input_grad[1])
        grads = saved.tensor_grads(x, rows, us, ctx.needs_input_grad[2:])
        return None, dx if ctx.needs_input_grad[1] else None, *grads


def dropout_mask(x: Tensor, p: float) -> Tensor | None:
    """True where kept. Drawn as nn.Dropout draws, so a seed gives PEFT's mask on the CPU."""
    if p == 0.0:
        return None
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p)


def check_adapter(name: str, linear: LoraLinear, rows: int, columns: int) -> None:
    """Raises where a and b do not fit `columns` inputs and `rows` outputs."""
    a, b = linear.a, linear.b
    if a is None or b is None:
        raise ValueError(f"{name}: expected both a and b")
    if a.shape[1:] != (columns,) or b.shape != (rows, a.shape[0]):
        raise ValueError(
            f"{name}: expected a (rank, {columns}) and b ({rows}, rank), "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"{name}: expected floating-point a and b, got {a.dtype} and {b.dtype}")
    if not 0.0 <= linear.dropout <= 1.0:
        raise ValueError(f"{name}.dropout: expected 0 to 1, got {linear.dropout}")


def _is_int8(weight: QuantizedWeight) -> bool:
    scale = weight.scale
    return weight.values.dtype is torch.int8 and scale is not None and scale.dtype is torch.float32


def _check(x: Tensor, linears: Sequence[LoraLinear]) -> None:
    if not linears:
        raise ValueError("linears: expected at least one")
    if not x.is_floating_point() or x.dim() == 0:
        raise TypeError(f"x: expected floating point (..., in), got {x.dtype} {tuple(x.shape)}")
    for i, each in enumerate(linears):
        weight = each.weight
        if isinstance(weight, Tensor) and weight.dim() != 2:
            raise ValueError(
                f"linears[{i}].weight: expected two dimensions, got {tuple(weight.shape)}"
            )
        rows, columns = weight.shape[::-1] if each.transposed else weight.shape
        if columns != x.shape[-1]:
            raise ValueError(
                f"linears[{i}].weight: expected {x.shape[-1]} inputs as x has, got {columns}"
            )
        if isinstance(weight, QuantizedWeight):
            if each.transposed or not _is_int8(weight):
                raise TypeError(f"linears[{i}].weight: expected int8 (out, in), a scale per output")
        elif weight.dtype != x.dtype:
            raise TypeError(f"linears[{i}].weight: expected {x.dtype}, got {weight.dtype}")
        if each.bias is not None and each.bias.shape != (rows,):
            raise ValueError(
                f"linears[{i}].bias: expected shape ({rows},), got {tuple(each.bias.shape)}"
            )
        if each.bias is not None and not each.bias.is_floating_point():
            raise TypeError(f"linears[{i}].bias: expected floating point, got {each.bias.dtype}")
        if (each.a is None) != (each.b is None):
            raise ValueError(f"linears[{i}]: expected both a and b, or neither")
        if each.a is not None:
            check_adapter(f"linears[{i}]", each, rows, columns)


def prepare(x: Tensor, linears: Sequence[LoraLinear]) -> tuple[Tensor, list[Tensor | None]]:
    """x as rows; weights, scales, biases, a, b, dropout masks of all linears in one flat list."""
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype is not torch.float64:
        x = x.to(dtype)
    weights = [each.weight for each in linears]
    if dtype is not None:
        weights = [w.to(x.dtype) if isinstance(w, Tensor) else w for w in weights]
    linears = [replace(each, weight=w) for w, each in zip(weights, linears, strict=True)]
    _check(x, linears)
    biases = [None if each.bias is None else each.bias.to(x.dtype) for each in linears]
    rows = rows_of(x)
    a, b = [], []
    for each in linears:
        out = each.weight.shape[1 if each.transposed else 0]
        a.append(rows.new_empty(0, rows.shape[1]) if each.a is None else each.a)
        b.append(rows.new_empty(out, 0) if each.b is None else each.b)
    masks = [dropout_mask(rows, each.dropout if each.a is not None else 0.0) for each in linears]
    values = [w if isinstance(w, Tensor) else w.values for w in weights]
    weight_scales = [
        None if isinstance(w, Tensor) or w.scale is None else w.scale[:, 0] for w in weights
    ]
    return rows, [*values, *weight_scales, *biases, *a, *b, *masks]


def lora_shared(x: Tensor, linears: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    """Several linears on one input x (..., in): a tuple of (..., out_i), dtype of x.

    Under autocast, x and the base weights are cast to autocast's dtype; the adapters are not.
    Raises: ValueError or TypeError that names the argument.
    """
    rows, tensors = prepare(x, linears)
    ys = _Lora.apply(_Group.of(linears), *distinct(rows, *tensors))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def lora(x: Tensor, linear: LoraLinear) -> Tensor:
    """x W^T + bias + scale * dropout(x) A^T B^T, for x (..., in): (..., out), dtype of x.

    Under autocast and for errors, see `lora_shared`.
    """
    return lora_shared(x, (linear,))[0]
