"""linear_cross_entropy: a model's head and its loss, without ever holding all logits.

    u = x W^T + bias + s (x A^T) B^T          x: (rows, hidden), W: (vocab, hidden), LoRA A, B, s
    loss = cross_entropy(u, labels)           as there, u scaled and soft-capped

One chunk of rows at a time: its logits are computed, turned in place into their gradient g by one
pass that also gives the losses, multiplied on, and forgotten, so gradients are finished forward:

    dx = g W + s (g B) A          dW = g^T x            dbias = sum over rows of g
    dA = s (g B)^T x              dB = s g^T (x A^T)

Only rows that have a label are computed. The sum's gradients wait for the upstream scalar; where
every loss has its own upstream gradient, it enters g, so the backward computes the chunks again.
Gradients of weights are added up in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft.library import autocast_dtype, distinct, implement, operator, rows_of
from fastft.ops import gemm
from fastft.ops.cross_entropy import (
    LossOptions,
    _cross_entropy,
    _cross_entropy_in_place,
    averaged,
    check_labels,
    check_weight,
)

# Logits in one chunk: few enough to stay in a last-level cache between the products, enough rows
# for the products to run at full speed.
_CHUNK = 6 << 20


@dataclass(frozen=True)
class Head:
    """A language model's head: logits = logit_scale (x weight^T + bias + s (x A^T) B^T).

    lora is (A: (rank, hidden), B: (vocab, rank), s); A and B may be wider than the weight.
    """

    weight: Tensor  # (vocab, hidden)
    bias: Tensor | None = None  # (vocab,)
    lora: tuple[Tensor, Tensor, float] | None = None
    logit_scale: float = 1.0


def _chunk_rows(rows: int, vocab: int) -> int:
    """Rows of one chunk: equal chunks, so that none is too small for a fast product."""
    limit = max(16, _CHUNK // max(vocab, 1))
    return -(-rows // max(1, -(-rows // limit)))


def _chunked(x, head, labels, class_weight, dlosses, ignore_index, numbers, needs):
    weight, bias, a, b = head
    lora_scale, loss_numbers = numbers[0], numbers[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(x.shape[0], dtype=wide)
    dx = x.new_empty(x.shape if needs[0] else 0)
    sums = [
        x.new_zeros(t.shape if need else 0, dtype=wide if t is None else _wide(t))
        for t, need in zip(head, needs[1:], strict=True)
    ]
    step = _chunk_rows(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], max(step, 1)):
        part = slice(start, start + step)
        logits = gemm.matmul(x[part], weight.t(), bias)
        low = None
        if a is not None:
            low = gemm.matmul(x[part].to(a.dtype), a.t())
            logits = logits.to(b.dtype).addmm_(low, b.t(), alpha=lora_scale)
        own = labels[part], class_weight
        if not any(needs):
            losses[part] = _cross_entropy(logits, *own, ignore_index, loss_numbers)[0]
            continue
        upstream = None if dlosses is None else dlosses[part]
        losses[part] = _cross_entropy_in_place(logits, *own, upstream, ignore_index, loss_numbers)
        _add_gradients(logits, x[part], low, head, lora_scale, dx[part] if needs[0] else None, sums)
        del logits  # before the next chunk's are allocated
    dtypes = [x.dtype if t is None else t.dtype for t in head]
    return losses, dx, *(s.to(d) for s, d in zip(sums, dtypes, strict=True))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _add_gradients(grad, x, low, head, lora_scale, dx, sums):
    weight, _, a, b = head
    dweight, dbias, da, db = sums
    if dx is not None:
        dx.copy_(gemm.matmul(grad.to(weight.dtype), weight))
    if dweight.numel():
        dweight.addmm_(grad.t().to(dweight.dtype), x.to(dweight.dtype))
    if dbias.numel():
        dbias.add_(grad.sum(0, dtype=dbias.dtype))
    if a is None:
        return
    if db.numel():
        db.addmm_(grad.t().to(db.dtype), low.to(db.dtype), alpha=lora_scale)
    if da.numel() or dx is not None:
        back = gemm.matmul(grad, b) * lora_scale
        if dx is not None:
            dx.add_(back @ a)
        if da.numel():
            da.addmm_(back.t().to(da.dtype), x.to(da.dtype))


@operator(
    "linear_cross_entropy(Tensor x, Tensor?[] head, Tensor labels, Tensor? class_weight,"
    " Tensor? dlosses, int ignore_index, float[] numbers, bool[] needs)"
    " -> (Tensor losses, Tensor dx, Tensor dweight, Tensor dbias, Tensor da, Tensor db)"
)
def _linear_cross_entropy(x, head, labels, class_weight, dlosses, ignore_index, numbers, needs):
    """head: weight, bias, A, B; numbers: LoRA's scale, then cross_entropy's; needs: x, then head.

    dlosses are the upstream gradients, ones where None. Gradients not needed are empty.
    """
    return _chunked(x, head, labels, class_weight, dlosses, ignore_index, numbers, needs)


@implement(_linear_cross_entropy, "CPU", "C++ and PyTorch's products")
def _labelled_only(x, head, labels, class_weight, dlosses, ignore_index, numbers, needs):
    # Compiled code has not looked at the labels' values before.
    check_labels(labels, ignore_index, x.shape[:1], head[0].shape[0])
    kept = (labels != ignore_index).nonzero()[:, 0]
    rest = class_weight, dlosses, ignore_index, numbers, needs
    if kept.numel() == labels.numel():
        return _chunked(x, head, labels, *rest)
    upstream = None if dlosses is None else dlosses[kept]
    losses, dx, *grads = _chunked(
        x[kept], head, labels[kept], class_weight, upstream, ignore_index, numbers, needs
    )
    every = losses.new_zeros(labels.shape).index_copy_(0, kept, losses)
    if needs[0]:
        dx = dx.new_zeros(x.shape).index_copy_(0, kept, dx)
    return every, dx, *grads


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses' sum, or with `each` the losses themselves."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, labels, class_weight, settings):
        # x: (rows, hidden)
        ignore_index, numbers, needs, each = settings
        losses, *finished = _linear_cross_entropy(
            x,
            [weight, bias, a, b],
            labels,
            class_weight,
            None,
            ignore_index,
            numbers,
            [False] * 5 if each else needs,
        )
        ctx.save_for_backward(x, weight, bias, a, b, labels, class_weight)
        ctx.settings, ctx.finished = settings, None if each else finished
        return losses if each else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        ignore_index, numbers, needs, each = ctx.settings
        grads, ctx.finished = ctx.finished, None
        if grads is None:
            # Every loss has its own upstream gradient, or the graph was kept and this is not the
            # first time: what the forward finished has been given away.
            x, *head, labels, class_weight = ctx.saved_tensors
            rows = upstream if each else None
            _, *grads = _linear_cross_entropy(
                x, head, labels, class_weight, rows, ignore_index, numbers, needs
            )
        if not each:
            # Private until now, so that a head's gradient need not be held twice.
            grads = [g.mul_(upstream) for g in grads]
        grads = (g if need else None for g, need in zip(grads, needs, strict=True))
        return *grads, None, None, None


def _check(x: Tensor, head: Head) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise TypeError(
            f"x: expected floating-point (..., hidden), got {x.dtype} of shape {tuple(x.shape)}"
        )
    weight, hidden = head.weight, x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden:
        raise ValueError(
            f"head.weight: expected shape (vocab, {hidden}), got {tuple(weight.shape)}"
        )
    if head.bias is not None and head.bias.shape != weight.shape[:1]:
        raise ValueError(
            f"head.bias: expected shape ({weight.shape[0]},), got {tuple(head.bias.shape)}"
        )
    if head.lora is not None:
        a, b, _ = head.lora
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != hidden:
            raise ValueError(f"head.lora: expected A (rank, {hidden}), got {tuple(a.shape)}")
        if b.shape != (weight.shape[0], a.shape[0]) or a.dtype != b.dtype:
            raise ValueError(
                f"head.lora: expected B ({weight.shape[0]}, {a.shape[0]}) of {a.dtype}, "
                f"got {tuple(b.shape)} of {b.dtype}"
            )


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"head.{name}: expected {x.dtype} as x has, got {tensor.dtype}")


def linear_cross_entropy(
    x: Tensor,  # (..., hidden)
    head: Head,
    labels: Tensor,  # (...) int64
    *,
    weight: Tensor | None = None,  # (vocab,)
    num_items: Tensor | float | None = None,
    **options,
) -> Tensor:
    """cross_entropy(logits of the head, labels) without holding the logits.

    weight, num_items, options, the result and its errors are `cross_entropy`'s. x, the head's
    weight and bias share one dtype, or are cast where autocast is on; LoRA may be of another.
    """
    chosen = LossOptions(**options)
    _check(x, head)
    vocab = head.weight.shape[0]
    check_labels(labels, chosen.ignore_index, x.shape[:-1], vocab)
    check_weight(weight, num_items, chosen.reduction, vocab)
    a, b, lora_scale = head.lora or (None, None, 1.0)
    tensors = [x, head.weight, head.bias, a, b]
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype is not torch.float64:
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    _check_dtypes(*tensors[:3])
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in tensors]
    flat, each = labels.reshape(-1), chosen.reduction == "none"
    numbers = [float(lora_scale), *chosen.numbers(head.logit_scale)]
    tensors = distinct(rows_of(tensors[0]), *tensors[1:], flat, weight)
    out = _LinearCrossEntropy.apply(*tensors, (chosen.ignore_index, numbers, needs, each))
    if each:
        return out.view(labels.shape)
    if chosen.reduction == "sum":
        return out
    return averaged(out, flat, weight, num_items, chosen.ignore_index)
