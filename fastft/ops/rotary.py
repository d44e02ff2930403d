"""rotary: queries and keys turned by the angles of their tokens, half against half, in one pass.

With x1, x2 the halves of the first rotary_dim elements of a head (arXiv 2104.09864, in the order of
Hugging Face's `rotate_half`), and c1, c2, s1, s2 the halves of cos and sin:

    y1 = x1 c1 - x2 s1        y2 = x2 c2 + x1 s2        the elements beyond rotary_dim pass through

Gradients are the transpose; the halves of cos and sin need not be equal:

    dx1 = dy1 c1 + dy2 s2     dx2 = dy2 c2 - dy1 s1

Computed in float32 and rounded once. The results are dense and lie in memory in the order that q
and k have, heads before tokens or tokens before heads, so that `transpose(1, 2).reshape(...)` after
them copies nothing; so do the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from fastft.library import (
    distinct,
    first_derivatives_only,
    implement_in_triton,
    needs_autograd,
    operator,
)


def _swapped(x: Tensor) -> bool:
    return x.stride(1) < x.stride(2)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, head_axis: int, swapped: bool, transposed: bool
) -> Tensor:
    if swapped:
        y = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    else:
        y = x.new_empty(x.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    rotary_dim = cos.shape[-1]
    x1, x2 = x[..., :rotary_dim].to(wide).chunk(2, -1)
    c1, c2 = cos.to(wide).unsqueeze(head_axis).chunk(2, -1)
    s1, s2 = sin.to(wide).unsqueeze(head_axis).chunk(2, -1)
    if transposed:
        s1, s2 = -s2, -s1
    y[..., : rotary_dim // 2] = x1 * c1 - x2 * s1
    y[..., rotary_dim // 2 : rotary_dim] = x2 * c2 + x1 * s2
    y[..., rotary_dim:] = x[..., rotary_dim:]
    return y


@operator(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim)"
    " -> (Tensor q_rotated, Tensor k_rotated)"
)
def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    q, k = (_rotate(x, cos, sin, unsqueeze_dim, _swapped(x), False) for x in (q, k))
    return q, k


# `swapped`: q had tokens before heads in memory (or the other way round with unsqueeze_dim 2).
# Queries and keys turn alike, so where only one of them needs a gradient it takes the first place.
@operator(
    "rotary_backward(Tensor dq, Tensor? dk, Tensor cos, Tensor sin, int unsqueeze_dim,"
    " bool swapped) -> (Tensor q_grad, Tensor k_grad)"
)
def _rotary_backward(
    dq: Tensor, dk: Tensor | None, cos: Tensor, sin: Tensor, unsqueeze_dim: int, swapped: bool
) -> tuple[Tensor, Tensor]:
    q_grad = _rotate(dq, cos, sin, unsqueeze_dim, swapped, True)
    if dk is None:
        return q_grad, dq.new_empty(0)
    return q_grad, _rotate(dk, cos, sin, unsqueeze_dim, swapped, True)


implement_in_triton("rotary", _rotary, _rotary_backward)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
    ) -> tuple[Tensor, Tensor]:
        # q: (batch, heads, tokens, head_dim), or with unsqueeze_dim 2 (batch, tokens, heads, …)
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim, ctx.swapped = unsqueeze_dim, _swapped(q)
        ctx.set_materialize_grads(False)
        return _rotary(q, k, cos, sin, unsqueeze_dim)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (*ctx.saved_tensors, ctx.unsqueeze_dim, ctx.swapped)
        q_grad, k_grad, *_ = ctx.needs_input_grad
        dq, dk = dq if q_grad else None, dk if k_grad else None
        if dq is not None:
            dq, other = _rotary_backward(dq, dk, *rest)
            dk = None if dk is None else other
        elif dk is not None:
            dk, _ = _rotary_backward(dk, None, *rest)
        return dq, dk, None, None, None


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_axis: int) -> None:
    if head_axis not in (1, 2):
        raise ValueError(f"unsqueeze_dim: expected 1 or 2, got {head_axis}")
    for name, x in (("q", q), ("cos", cos), ("sin", sin)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.dtype is torch.float64 and q.dtype is not torch.float64:
            raise TypeError(f"{name}: expected float32 or smaller for {q.dtype}, got {x.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected {q.dtype} as q has, got {k.dtype}")
    q_shape, k_shape, shape = q.shape, k.shape, cos.shape
    if len(q_shape) != 4:
        raise ValueError(f"q: expected four dimensions, got shape {tuple(q_shape)}")
    batch, tokens, head_dim = q_shape[0], q_shape[3 - head_axis], q_shape[3]
    alike = len(k_shape) == 4 and k_shape[0] == batch and k_shape[3] == head_dim
    if not alike or k_shape[3 - head_axis] != tokens:
        raise ValueError(
            f"k: expected the shape of q but for the heads (dimension {head_axis}), "
            f"{tuple(q_shape)}, got {tuple(k_shape)}"
        )
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] == tokens
    if not fits or shape[2] > head_dim or shape[2] % 2:
        raise ValueError(
            f"cos: expected shape ({batch} or 1, {tokens}, an even rotary_dim up to {head_dim}), "
            f"got {tuple(shape)}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos and sin: expected tensors that need no gradient: they get none")
    if sin.shape != shape:
        raise ValueError(f"sin: expected shape {tuple(shape)} as cos has, got {tuple(sin.shape)}")


def rotary(
    q: Tensor,  # (batch, heads, tokens, head_dim)
    k: Tensor,  # (batch, kv_heads, tokens, head_dim)
    cos: Tensor,  # (batch or 1, tokens, rotary_dim)
    sin: Tensor,  # (batch or 1, tokens, rotary_dim)
    *,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """q and k turned by their tokens' angles, as transformers' `apply_rotary_pos_emb`.

    Args: `unsqueeze_dim` is the dimension of the heads: 2 for q and k as (batch, tokens, heads,
    head_dim). rotary_dim may be less than head_dim; the tail then passes through. q and k share
    one dtype; cos and sin may have others, and get no gradient: they are functions of positions.
    Returns: q and k turned, in their own dtype. (Given cos in float32 and q in bfloat16,
    transformers' function returns float32; its models cast cos to the dtype of q first.) Each is
    dense, in its input's order of heads and tokens in memory.
    Raises: ValueError or TypeError that names the argument.
    """
    _check(q, k, cos, sin, unsqueeze_dim)
    if needs_autograd(q, k):
        out: tuple[Tensor, Tensor] = _Rotary.apply(*distinct(q, k, cos, sin), unsqueeze_dim)
        return out
    # Decoding makes thousands of small calls, which the autograd Function would slow.
    return _rotary(q, k, cos, sin, unsqueeze_dim)
