"""A head and its loss in blocks, logits recomputed: only the logsumexp of each row is kept.

    z = c tanh(s x W^T / c)                   s: logit scale, c: softcap; z = s x W^T without
    lse = logsumexp(z), loss = lse - z[label]
    G = e^(z - lse) - onehot(label);  with the upstream gradient d, and G' = G d s (1 - (z / c)^2):
    dx = G' W,  dW = G'^T x

A tile of logits lives in one program and never reaches memory. A program owns its rows of dx,
or of dW, and adds to them in the order of its loop: no locks, no atomics, the same bits in every
run. In half types, tiles where every |G| < eps / 32 (2^-12 in bfloat16) are skipped, as in
cut-cross-entropy (arXiv 2411.09009): beside a gradient of 1 they round to nothing. In float32
nothing is skipped.

Rows without a label come last, and their number stays on the device: nothing is computed for them,
and the host waits for nothing. A label outside the vocabulary makes its loss and its row of dx NaN.
Without bias, LoRA, class weights and label smoothing, which only the chunks of rows serve.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import BFLOAT16, NAMES, Configuration, capability, on_device, processors, tanh


@triton.jit
def _logits(
    x, weight, x_stride, weight_stride, row, column, rows, vocab, hidden, scale, softcap,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z of one tile, in float32."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, hidden, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + row.to(tl.int64)[:, None] * x_stride + depth[None, :],
            mask=(row[:, None] < rows) & (depth[None, :] < hidden),
            other=0.0,
        )
        right = tl.load(
            weight + column.to(tl.int64)[None, :] * weight_stride + depth[:, None],
            mask=(column[None, :] < vocab) & (depth[:, None] < hidden),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= scale
    if SOFTCAP:
        total = softcap * tanh(total / softcap)
    return total


@triton.jit
def _forward(
    x, weight, labels, labelled, lse, target, x_stride, weight_stride, rows, vocab, hidden,
    ignore_index, scale, softcap,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    kept = tl.load(labelled).to(tl.int32)
    if tl.program_id(0) * ROWS >= kept:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    label = tl.load(labels + row, mask=row < kept, other=ignore_index)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    for start in range(split * COLUMNS, vocab, tl.num_programs(1) * COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = _logits(
            x, weight, x_stride, weight_stride, row, column, kept, vocab, hidden, scale, softcap,
            SOFTCAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        z = tl.where(column[None, :] < vocab, z, float("-inf"))
        own += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), 1)
        higher = tl.maximum(maximum, tl.max(z, 1))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        maximum = higher
    place = split.to(tl.int64) * rows + row
    tl.store(lse + place, maximum + tl.log(total), mask=row < kept)
    tl.store(target + place, own, mask=row < kept)


@triton.jit
def _backward(
    x, weight, labels, labelled, lse, upstream, grad, x_stride, weight_stride, vocab, hidden,
    ignore_index, scale, softcap, threshold,
    OF_WEIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Adds to this program's block of grad: rows of dx, or with OF_WEIGHT rows of dW."""
    first = tl.program_id(0)
    rows = tl.load(labelled).to(tl.int32)
    if not OF_WEIGHT:
        if first * ROWS >= rows:
            return
    for start in range(0, rows if OF_WEIGHT else vocab, ROWS if OF_WEIGHT else COLUMNS):
        row = (start if OF_WEIGHT else first * ROWS) + tl.arange(0, ROWS)
        column = (first * COLUMNS if OF_WEIGHT else start) + tl.arange(0, COLUMNS)
        z = _logits(
            x, weight, x_stride, weight_stride, row, column, rows, vocab, hidden, scale, softcap,
            SOFTCAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        label = tl.load(labels + row, mask=row < rows, other=ignore_index)
        logarithm = tl.load(lse + row, mask=row < rows, other=0.0)
        g = tl.exp(z - logarithm[:, None])
        g = tl.where(column[None, :] == label[:, None], g - 1.0, g)
        g = tl.where((column[None, :] < vocab) & (label[:, None] != ignore_index), g, 0.0)
        if tl.max(tl.abs(g)) >= threshold:
            if SOFTCAP:
                g *= 1.0 - (z / softcap) * (z / softcap)
            g *= tl.load(upstream + row, mask=row < rows, other=0.0)[:, None]
            if OF_WEIGHT:
                _add_product(
                    tl.trans(g).to(x.dtype.element_ty), x, x_stride, grad, column, row, vocab,
                    rows, hidden, DEPTH,
                )  # fmt: skip
            else:
                _add_product(
                    g.to(x.dtype.element_ty), weight, weight_stride, grad, row, column, rows,
                    vocab, hidden, DEPTH,
                )  # fmt: skip
        # The next tile's sum may be read by other threads than those that wrote this one.
        tl.debug_barrier()


@triton.jit
def _add_product(
    left, matrix, stride, grad, outer, inner, outer_size, inner_size, hidden, DEPTH: tl.constexpr
):
    """grad[outer] += left matrix[inner], hidden taken in blocks."""
    for start in range(0, hidden, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        right = tl.load(
            matrix + inner.to(tl.int64)[:, None] * stride + depth[None, :],
            mask=(inner[:, None] < inner_size) & (depth[None, :] < hidden),
            other=0.0,
        )
        place = grad + outer.to(tl.int64)[:, None] * hidden + depth[None, :]
        inside = (outer[:, None] < outer_size) & (depth[None, :] < hidden)
        old = tl.load(place, mask=inside, other=0.0)
        tl.store(place, old + tl.dot(left, right, input_precision="ieee"), mask=inside)


def _tile(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Sizes of one tile; without tensor cores for it, the product holds its operands in registers.

    Triton has no tensor cores on Turing, and float32 is not rounded to fit them.
    """
    if dtype is torch.float32 or capability < 80:
        return {"ROWS": 32, "COLUMNS": 32, "DEPTH": 16}
    return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


@dataclass(frozen=True)
class _Labelled:
    """The rows in an order that puts those with a label first, made without asking the device."""

    order: Tensor  # (rows,) int64
    labels: Tensor  # (rows,) in this order
    kept: Tensor  # (rows,) bool: not ignored
    wrong: Tensor  # (rows,) bool: a label outside the vocabulary
    count: Tensor  # () int64: rows that are not ignored

    @staticmethod
    def of(labels: Tensor, ignore_index: int, vocab: int) -> "_Labelled":
        order = (labels == ignore_index).to(torch.uint8).argsort(stable=True)
        labels = labels[order]
        kept = labels != ignore_index
        wrong = kept & ((labels < 0) | (labels >= vocab))
        return _Labelled(order, labels, kept, wrong, kept.sum())

    def back(self, values: Tensor) -> Tensor:
        """Rows in their first order."""
        return torch.empty_like(values).index_copy_(0, self.order, values)


def linear_cross_entropy_blockwise(x, weight, labels, ignore_index, numbers, splits=None):
    """`splits` programs share the vocabulary of one block of rows; by default as many as fill
    the device. Their results are merged in a fixed order."""
    (rows, hidden), vocab = x.shape, weight.shape[0]
    softcap, scale = numbers
    weight, labelled = _rows(weight), _Labelled.of(labels, ignore_index, vocab)
    x = x[labelled.order]
    size = _tile(x.dtype, capability(x))
    row_blocks, blocks = triton.cdiv(rows, size["ROWS"]), triton.cdiv(vocab, size["COLUMNS"])
    wanted = splits or triton.cdiv(2 * processors(x), max(1, row_blocks))
    splits = max(1, min(wanted, blocks))
    lse = x.new_empty(splits, rows, dtype=torch.float32)
    target = torch.empty_like(lse)
    if rows:
        with on_device(x):
            _forward[(row_blocks, splits)](
                x, weight, labelled.labels, labelled.count, lse, target, x.stride(0),
                weight.stride(0), rows, vocab, hidden, ignore_index, scale, softcap,
                SOFTCAP=softcap != 0.0, **size, num_warps=4, num_stages=3,
            )  # fmt: skip
    merged = torch.where(labelled.kept, lse[0] if splits == 1 else lse.logsumexp(0), 0.0)
    losses = torch.where(labelled.kept, merged - target.sum(0), 0.0)
    losses = losses.masked_fill(labelled.wrong, float("nan"))
    return labelled.back(losses), labelled.back(merged)


def linear_cross_entropy_blockwise_backward(
    dlosses, x, weight, labels, lse, ignore_index, numbers, needs
):
    (rows, hidden), vocab = x.shape, weight.shape[0]
    softcap, scale = numbers
    weight, labelled = _rows(weight), _Labelled.of(labels, ignore_index, vocab)
    x, lse = x[labelled.order], lse[labelled.order]
    # Rows enter relative to the largest: a mean's 1 / rows would sink G into float16's subnormals.
    wide = torch.where(labelled.kept, dlosses[labelled.order].to(torch.float32), 0.0)
    largest = wide.abs().amax() if rows else wide.new_ones(())
    largest = torch.where(largest == 0, 1.0, largest)
    upstream = wide / largest
    largest = largest * scale
    threshold = 0.0 if x.dtype is torch.float32 else torch.finfo(x.dtype).eps / 32
    size = _tile(x.dtype, capability(x))
    results = []
    for of_weight, like, block in ((False, x, size["ROWS"]), (True, weight, size["COLUMNS"])):
        if not needs[of_weight]:
            results.append(x.new_empty(0))
            continue
        grad = torch.zeros(like.shape, dtype=torch.float32, device=x.device)
        if grad.numel():
            with on_device(x):
                _backward[(triton.cdiv(like.shape[0], block),)](
                    x, weight, labelled.labels, labelled.count, lse, upstream, grad, x.stride(0),
                    weight.stride(0), vocab, hidden, ignore_index, scale, softcap, threshold,
                    OF_WEIGHT=of_weight, SOFTCAP=softcap != 0.0, **size, num_warps=4,
                    num_stages=3,
                )  # fmt: skip
        if of_weight:
            results.append(grad.mul_(largest).to(like.dtype))
        else:
            factor = torch.where(labelled.wrong, float("nan"), largest)
            results.append(labelled.back(grad.mul_(factor[:, None]).to(like.dtype)))
    return tuple(results)


def configurations() -> Iterator[Configuration]:
    # Half types differ in the compiler only where one of them is missing.
    meant = {
        torch.float32: (75, 80, 90, 100, 120), torch.bfloat16: BFLOAT16, torch.float16: (75, 100),
    }  # fmt: skip
    for dtype, architectures in meant.items():
        name = NAMES[dtype]
        p, f = f"*{name}", "*fp32"
        types = {
            "x": p, "weight": p, "labels": "*i64", "labelled": "*i64", "lse": f, "target": f,
            "upstream": f, "grad": f, "x_stride": "i64", "weight_stride": "i64",
            **dict.fromkeys(("rows", "vocab", "hidden", "ignore_index"), "i32"),
            **dict.fromkeys(("scale", "softcap", "threshold"), "fp32"),
        }  # fmt: skip
        forms = (
            (_forward, {}),
            (_backward, {"OF_WEIGHT": False}),
            (_backward, {"OF_WEIGHT": True}),
        )
        for (kernel, form), architecture in product(forms, architectures):
            yield Configuration(
                kernel,
                {argument: types[argument] for argument in kernel.arg_names if argument in types},
                {"SOFTCAP": True, **form, **_tile(dtype, architecture)},
                architectures=(architecture,),
                # Where nothing is known of the rows' alignment.
                stack=64,
                aligned_stack=8,
                multiples=("x_stride", "weight_stride", "vocab", "hidden"),
                label=f"{name} {form}",
            )
