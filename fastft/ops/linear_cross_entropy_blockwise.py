"""linear_cross_entropy_blockwise: a head and its loss without holding even a chunk of the logits.

    z = c tanh(s x W^T / c)            x: (rows, hidden), W: (vocab, hidden), scale s, softcap c
    loss = lse - z[label],  lse = logsumexp(z)
    G = dloss (e^(z - lse) - onehot(label)) s (1 - (z / c)^2):      dx = G W,  dW = G^T x

Only lse is kept of the forward; the backward computes the logits again, once for dx and once for
dW. That is 3 products of x and W with a frozen head and 5 without, where `linear_cross_entropy`'s
chunks of rows need 2 and 3, so this form saves their memory (half a GB) at the price of time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastft.library import first_derivatives_only, implement_in_triton, operator
from fastft.ops import gemm
from fastft.ops.cross_entropy import _seen, _targets

# Rows that the reference takes at a time: it needs the logits of those.
_ROWS = 1024


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _parts(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, x.shape[0], _ROWS))


@operator(
    "linear_cross_entropy_blockwise(Tensor x, Tensor weight, Tensor labels, int ignore_index,"
    " float[] numbers) -> (Tensor losses, Tensor lse)"
)
def _blockwise(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """numbers: softcap (0: none), logit scale. Ignored rows have the loss and the lse 0."""
    losses, lse = (x.new_empty(x.shape[0], dtype=_wide(x)) for _ in range(2))
    kept, target = _targets(labels, ignore_index)
    for part in _parts(x):
        z = _seen(gemm.matmul(x[part], weight.t()), [0.0, *numbers])
        total = z.logsumexp(1)
        own = z.gather(1, target[part, None])[:, 0]
        lse[part] = torch.where(kept[part], total, 0.0)
        losses[part] = torch.where(kept[part], total - own, 0.0)
    return losses, lse


@operator(
    "linear_cross_entropy_blockwise_backward(Tensor dlosses, Tensor x, Tensor weight,"
    " Tensor labels, Tensor lse, int ignore_index, float[] numbers, bool[] needs)"
    " -> (Tensor dx, Tensor dweight)"
)
def _blockwise_backward(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    numbers: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """needs: dx, dweight; empty where not needed."""
    softcap, scale = numbers
    kept, target = _targets(labels, ignore_index)
    upstream = torch.where(kept, dlosses.to(_wide(x)), 0.0) * scale
    dx = x.new_empty(x.shape if needs[0] else 0)
    dweight = x.new_zeros(weight.shape if needs[1] else 0, dtype=_wide(weight))
    for part in _parts(x):
        z = _seen(gemm.matmul(x[part], weight.t()), [0.0, *numbers])
        grad = (z - lse[part, None]).exp()
        grad = grad.scatter_add(1, target[part, None], grad.new_full((grad.shape[0], 1), -1.0))
        if softcap:
            grad = grad * (1 - (z / softcap).square())
        grad = (grad * upstream[part, None]).to(x.dtype)
        if needs[0]:
            dx[part] = gemm.matmul(grad, weight)
        if needs[1]:
            gemm.add_product_(dweight, grad.t(), x[part])
    return dx, dweight.to(weight.dtype)


implement_in_triton("linear_cross_entropy", _blockwise, _blockwise_backward)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, settings: tuple[Any, ...]
    ) -> Tensor:
        # x: (rows, hidden)
        losses, lse = _blockwise(x, weight, labels, *settings)
        ctx.save_for_backward(x, weight, labels, lse)
        ctx.settings = settings
        return losses

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])
        arguments = (*ctx.saved_tensors, *ctx.settings, needs)
        grads = _blockwise_backward(dlosses, *arguments)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def blockwise(
    x: Tensor,  # (rows, hidden)
    weight: Tensor,  # (vocab, hidden), of x's dtype
    labels: Tensor,  # (rows,) int64
    ignore_index: int = -100,
    softcap: float = 0.0,  # 0: none
    logit_scale: float = 1.0,
) -> Tensor:
    """The loss of every row, in float32 (float64 for float64)."""
    out: Tensor = _Blockwise.apply(x, weight, labels, (ignore_index, [softcap, logit_scale]))
    return out
