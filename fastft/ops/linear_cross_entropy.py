"""linear_cross_entropy: a model's head and its loss, without ever holding all logits.

    u = x W^T + bias + s (x A^T) B^T          x: (rows, hidden), W: (vocab, hidden), LoRA A, B, s
    loss = cross_entropy(u, labels)           as there, u scaled and soft-capped

In one of two forms: `linear_cross_entropy_chunked` holds the logits of a chunk of rows,
`linear_cross_entropy_blockwise` recomputes them. The second is taken on request only: it does 3
products with a frozen head and 5 without, the chunks do 2 and 3, so it loses by that count wherever
a chunk fits, and even where it skips every tile that it may (2 and 3, without a GEMM library).
That has not been measured on a GPU yet.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.library import autocast_dtype, distinct, rows_of
from fastft.ops.cross_entropy import LossOptions, averaged, check_labels, check_weight
from fastft.ops.linear_cross_entropy_blockwise import blockwise
from fastft.ops.linear_cross_entropy_chunked import chunked


@dataclass(frozen=True)
class Head:
    """A language model's head: logits = logit_scale (x weight^T + bias + s (x A^T) B^T).

    lora is (A: (rank, hidden), B: (vocab, rank), s); A and B may be wider than the weight.
    """

    weight: Tensor  # (vocab, hidden)
    bias: Tensor | None = None  # (vocab,)
    lora: tuple[Tensor, Tensor, float] | None = None
    logit_scale: float = 1.0


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


def _check_form(form: str, head: Head, weight: Tensor | None, options: LossOptions) -> None:
    if form not in ("chunked", "blockwise"):
        raise ValueError(f"form: expected 'chunked' or 'blockwise', got {form!r}")
    extras = {
        "head.bias": head.bias is not None,
        "head.lora": head.lora is not None,
        "weight": weight is not None,
        "label_smoothing": options.label_smoothing != 0,
    }
    given = [name for name, there in extras.items() if there]
    if form == "blockwise" and given:
        raise ValueError(f"form: expected 'chunked' with {given[0]}, got 'blockwise'")


def linear_cross_entropy(
    x: Tensor,  # (..., hidden)
    head: Head,
    labels: Tensor,  # (...) int64
    *,
    weight: Tensor | None = None,  # (vocab,)
    num_items: Tensor | float | None = None,
    form: str = "chunked",
    **options: Any,
) -> Tensor:
    """cross_entropy(logits of the head, labels) without holding the logits.

    weight, num_items, options, the result and its errors are `cross_entropy`'s. x, the head's
    weight and bias share one dtype, or are cast where autocast is on; LoRA may be of another.
    form "blockwise" holds not even a chunk of the logits, and takes longer (see above): for heads
    without bias and LoRA, losses without class weights and label smoothing.

    On GPUs a label outside the vocabulary is a ValueError where the rows without a label are
    sought, in large products; else the host waits for nothing, and the loss is NaN.
    """
    chosen = LossOptions(**options)
    _check(x, head)
    vocab = head.weight.shape[0]
    check_labels(labels, chosen.ignore_index, x.shape[:-1], vocab)
    check_weight(weight, num_items, chosen.reduction, vocab)
    _check_form(form, head, weight, chosen)
    a, b, lora_scale = head.lora or (None, None, 1.0)
    tensors: list[Any] = [x, head.weight, head.bias, a, b]
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype is not torch.float64:
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    _check_dtypes(*tensors[:3])
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in tensors]
    flat, each = labels.reshape(-1), chosen.reduction == "none"
    numbers = [float(lora_scale), *chosen.numbers(head.logit_scale)]
    tensors[:] = distinct(rows_of(tensors[0]), *tensors[1:], flat, weight)
    if form == "blockwise":
        softcap, logit_scale = numbers[2:]
        rows, head_weight = tensors[:2]
        out = blockwise(rows, head_weight, flat, chosen.ignore_index, softcap, logit_scale)
        out = out if each else out.sum()
    else:
        x, *rest, flat, weight = tensors
        out = chunked(x, rest, flat, weight, chosen.ignore_index, numbers, needs, each)
    if each:
        return out.view(labels.shape)
    if chosen.reduction == "sum":
        return out
    return averaged(out, flat, weight, num_items, chosen.ignore_index)
