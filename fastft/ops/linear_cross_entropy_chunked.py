"""linear_cross_entropy in chunks of rows: a chunk of the logits is held, never all of them.

    u = x W^T + bias + s (x A^T) B^T          x: (rows, hidden), W: (vocab, hidden), LoRA A, B, s

One chunk of rows at a time: its logits are computed, turned in place into their gradient g by one
pass that also gives the losses, multiplied on, and forgotten, so gradients are finished forward:

    dx = g W + s (g B) A          dW = g^T x            dbias = sum over rows of g
    dA = s (g B)^T x              dB = s g^T (x A^T)

Only rows that have a label are computed. The sum's gradients wait for the upstream scalar; where
every loss has its own upstream gradient, it enters g, so the backward computes the chunks again.
Gradients of weights are added up in float32.
"""

from typing import Any

import torch
from torch import Tensor

from fastft.library import first_derivatives_only, implement, operator
from fastft.ops import gemm
from fastft.ops.cross_entropy import (
    _cross_entropy,
    _cross_entropy_in_place,
    refuse_wrong_labels,
)

# Logits in one chunk on the CPU: few enough to stay in a last-level cache between the products,
# enough rows for the products to run at full speed.
_CHUNK = 6 << 20
# On GPUs, bytes of a chunk's logits, and rows below which products and the float32 sum of a head's
# gradient, which every chunk reads and writes, would take longer. NOT YET MEASURED ON A GPU.
_GPU_CHUNK_BYTES = 512 << 20
_GPU_ROWS = 1024
# Multiply-adds of x W^T from which finding the rows with a label is worth that the host waits for
# the device once: some 0.1 ms, against 1 ms or more of products, of which chat data leave out half.
# NOT YET MEASURED ON A GPU.
_GPU_WORTH_WAITING = 1 << 36


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _chunk_rows(x: Tensor, vocab: int) -> int:
    """Rows of one chunk: equal chunks, so that none is too small for a fast product."""
    if _on_gpu(x):
        limit, whole = max(_GPU_ROWS, _GPU_CHUNK_BYTES // max(vocab * x.itemsize, 1)), 128
    else:
        limit, whole = max(16, _CHUNK // max(vocab, 1)), 1
    rows = -(-x.shape[0] // max(1, -(-x.shape[0] // limit)))
    return max(1, -(-rows // whole) * whole)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _on_gpu(x):
        return gemm.matmul(x, weight.t(), bias)
    # Rows begin at multiples of 16 bytes: cuBLAS is much slower where they do not (GPT-2's 50,257).
    vocab = weight.shape[0]
    logits = x.new_empty(x.shape[0], -(-vocab // 8) * 8)[:, :vocab]
    if bias is None:
        return torch.mm(x, weight.t(), out=logits)
    return torch.addmm(bias, x, weight.t(), out=logits)


def _chunked(
    x: Tensor,
    head: list[Any],  # weight, and Tensor or None each: bias, a, b
    labels: Tensor,
    class_weight: Tensor | None,
    dlosses: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight, bias, a, b = head
    lora_scale, loss_numbers = numbers[0], numbers[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(x.shape[0], dtype=wide)
    dx = x.new_empty(x.shape if needs[0] else 0)
    step = _chunk_rows(x, weight.shape[0])
    # A GPU's product sums in float32 by itself, so one chunk's needs no wider room.
    sum_dtype = _own if _on_gpu(x) and step >= x.shape[0] else _wide
    sums = [
        x.new_zeros(t.shape if need else 0, dtype=wide if t is None else sum_dtype(t))
        for t, need in zip(head, needs[1:], strict=True)
    ]
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        logits = _logits(x[part], weight, bias)
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
    dweight, dbias, da, db = (s.to(d) for s, d in zip(sums, dtypes, strict=True))
    return losses, dx, dweight, dbias, da, db


def _own(t: Tensor) -> torch.dtype:
    return t.dtype


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _add_gradients(
    grad: Tensor,
    x: Tensor,
    low: Any,  # None without LoRA
    head: list[Any],  # weight, and Tensor or None each: bias, a, b
    lora_scale: float,
    dx: Tensor | None,
    sums: list[Tensor],
) -> None:
    weight, _, a, b = head
    dweight, dbias, da, db = sums
    if dx is not None:
        dx.copy_(gemm.matmul(grad.to(weight.dtype), weight))
    if dweight.numel():
        gemm.add_product_(dweight, grad.t(), x)
    if dbias.numel():
        dbias.add_(grad.sum(0, dtype=dbias.dtype))
    if a is None:
        return
    if db.numel():
        gemm.add_product_(db, grad.t(), low, lora_scale)
    if da.numel() or dx is not None:
        back = gemm.matmul(grad, b) * lora_scale
        if dx is not None:
            dx.add_(back @ a)
        if da.numel():
            gemm.add_product_(da, back.t(), x)


@operator(
    "linear_cross_entropy(Tensor x, Tensor?[] head, Tensor labels, Tensor? class_weight,"
    " Tensor? dlosses, int ignore_index, float[] numbers, bool[] needs)"
    " -> (Tensor losses, Tensor dx, Tensor dweight, Tensor dbias, Tensor da, Tensor db)"
)
def _linear_cross_entropy(
    x: Tensor,
    head: list[Any],  # weight, and Tensor or None each: bias, a, b
    labels: Tensor,
    class_weight: Tensor | None,
    dlosses: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """head: weight, bias, A, B; numbers: LoRA's scale, then cross_entropy's; needs: x, then head.

    dlosses are the upstream gradients, ones where None. Gradients not needed are empty.
    """
    return _chunked(x, head, labels, class_weight, dlosses, ignore_index, numbers, needs)


@implement(_linear_cross_entropy, "CPU", "C++ and PyTorch's products")
def _labelled_only(
    x: Tensor,
    head: list[Any],  # weight, and Tensor or None each: bias, a, b
    labels: Tensor,
    class_weight: Tensor | None,
    dlosses: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Compiled code, and code for GPUs, has not looked at the labels' values before.
    refuse_wrong_labels(labels, ignore_index, head[0].shape[0])
    kept = (labels != ignore_index).nonzero()[:, 0]
    rest = class_weight, dlosses, ignore_index, numbers, needs
    if kept.numel() == labels.numel():
        return _chunked(x, head, labels, *rest)
    upstream = None if dlosses is None else dlosses[kept]
    losses, dx, dweight, dbias, da, db = _chunked(
        x[kept], head, labels[kept], class_weight, upstream, ignore_index, numbers, needs
    )
    every = losses.new_zeros(labels.shape).index_copy_(0, kept, losses)
    if needs[0]:
        dx = dx.new_zeros(x.shape).index_copy_(0, kept, dx)
    return every, dx, dweight, dbias, da, db


@implement(_linear_cross_entropy, "CUDA", "Triton and PyTorch's products")
def _for_cuda(
    x: Tensor, head: list[Any], labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows without a label are left out where that is worth a wait, which a graph cannot record."""
    worth = x.numel() * head[0].shape[0] >= _GPU_WORTH_WAITING
    if worth and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _labelled_only(x, head, labels, *rest)
    return _chunked(x, head, labels, *rest)


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses' sum, or with `each` the losses themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        settings: tuple[Any, ...],
    ) -> Tensor:
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
    @first_derivatives_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
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


def chunked(
    x: Tensor,
    head: list[Any],  # weight, and Tensor or None each: bias, a, b
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    numbers: list[float],
    needs: list[bool],
    each: bool,
) -> Tensor:
    """The losses' sum, or with `each` the losses; arguments as the operator's."""
    settings = ignore_index, numbers, needs, each
    out: Tensor = _LinearCrossEntropy.apply(x, *head, labels, class_weight, settings)
    return out
