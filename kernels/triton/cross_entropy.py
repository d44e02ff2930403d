"""cross_entropy: losses from one read of the logits; gradients from one read and one write.

Every lane of a program keeps the running maximum and sum of exponentials of the elements it saw,
one exponential each; the lanes meet once per row. Ignored rows are not read.

A label outside the vocabulary reads nothing: its loss is NaN, and so is its row of the gradient.
The host learns of it without waiting for the device, and the device stays usable, as it would not
after an assert.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .common import (
    ARCHITECTURES,
    BFLOAT16,
    NAMES,
    Configuration,
    next_power_of_2,
    on_device,
    rows_of,
    tanh,
)

BLOCK = 4096


@triton.jit
def _read(row, columns, inside, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits as the loss sees them, those outside as -inf; and their tanh, where capped."""
    z = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32) * scale
    t = z
    if SOFTCAP:
        t = tanh(z / softcap)
        z = softcap * t
    return tl.where(inside, z, float("-inf")), t


@triton.jit
def _losses(
    logits, label, kept, wrong, weight, weight_sum, vocab,
    smoothing, scale, softcap,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, maximum and sum of exponentials of a row; 0, 0 and 1 for an ignored one."""
    lanes = tl.arange(0, BLOCK)
    own = _read(logits, label, kept, scale, softcap, SOFTCAP)[0]
    # The smallest number in place of -inf, whose difference from itself is not one.
    maxima = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    # Sums of differences from a logit of the row lose less than sums of the logits.
    origin = tl.where(tl.abs(own) < float("inf"), own, 0.0)
    for start in range(0, tl.where(kept, vocab, 0), BLOCK):
        columns = start + lanes
        inside = columns < vocab
        z = _read(logits, columns, inside, scale, softcap, SOFTCAP)[0]
        smaller = tl.exp(-tl.abs(z - maxima))
        sums = tl.where(z > maxima, sums * smaller + 1.0, sums + smaller)
        maxima = tl.maximum(maxima, z)
        if SMOOTHING:
            shifted = tl.where(inside, z - origin, 0.0)
            if HAS_WEIGHT:
                shifted *= tl.load(weight + columns, mask=inside, other=0.0)
            rest += shifted
    maximum = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp(maxima - maximum), 0)
    logarithm = tl.log(total)
    loss = logarithm - (own - maximum)
    if HAS_WEIGHT:
        loss *= tl.load(weight + label, mask=kept, other=0.0)
    if SMOOTHING:
        even = weight_sum * (logarithm + (maximum - origin)) - tl.sum(rest, 0)
        loss = (1.0 - smoothing) * loss + smoothing / vocab * even
    loss = tl.where(wrong, float("nan"), tl.where(kept, loss, 0.0))
    return loss, tl.where(kept, maximum, 0.0), tl.where(kept, total, 1.0)


@triton.jit
def _gradient(
    source, target, columns, label, kept, wrong, weight, weight_sum, vocab, maximum, total, dloss,
    smoothing, scale, softcap,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a row's columns: 0 where it is ignored, NaN for a wrong label."""
    inside = columns < vocab
    z, t = _read(source, columns, inside & kept, scale, softcap, SOFTCAP)
    own, spread = 1.0 - smoothing, smoothing / vocab
    if HAS_WEIGHT:
        own *= tl.load(weight + label, mask=kept, other=0.0)
    grad = tl.exp(z - maximum) * ((own + spread * weight_sum) / total)
    if SMOOTHING:
        if HAS_WEIGHT:
            grad -= spread * tl.load(weight + columns, mask=inside, other=0.0)
        else:
            grad -= spread
    grad = tl.where(columns == label, grad - own, grad)
    if SOFTCAP:
        grad *= 1.0 - t * t
    grad = tl.where(wrong, float("nan"), tl.where(kept, grad * (scale * dloss), 0.0))
    tl.store(target + columns, grad.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    logits, labels, weight, weight_sum, losses, stats,
    logits_stride, labels_stride, vocab, ignore_index, smoothing, scale, softcap,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row * labels_stride)
    counts = label != ignore_index
    kept = counts & (label >= 0) & (label < vocab)
    mass = tl.load(weight_sum) if HAS_WEIGHT else vocab * 1.0
    loss, maximum, total = _losses(
        logits + row * logits_stride, label, kept, counts & (kept == 0), weight, mass, vocab,
        smoothing, scale, softcap, HAS_WEIGHT, SMOOTHING, SOFTCAP, BLOCK,
    )  # fmt: skip
    tl.store(losses + row, loss)
    tl.store(stats + 2 * row, maximum)
    tl.store(stats + 2 * row + 1, total)


@triton.jit
def _backward(
    dlosses, logits, labels, weight, weight_sum, stats, dlogits,
    dlosses_stride, logits_stride, labels_stride, pieces, vocab, ignore_index,
    smoothing, scale, softcap,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row * labels_stride)
    counts = label != ignore_index
    kept = counts & (label >= 0) & (label < vocab)
    mass = tl.load(weight_sum) if HAS_WEIGHT else vocab * 1.0
    dloss = tl.load(dlosses + row * dlosses_stride).to(tl.float32)
    _gradient(
        logits + row * logits_stride, dlogits + row * vocab, columns, label, kept,
        counts & (kept == 0), weight, mass, vocab,
        tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1), dloss,
        smoothing, scale, softcap, HAS_WEIGHT, SMOOTHING, SOFTCAP,
    )  # fmt: skip


@triton.jit
def _in_place(
    dlosses, logits, labels, weight, weight_sum, losses,
    dlosses_stride, logits_stride, labels_stride, vocab, ignore_index,
    smoothing, scale, softcap, HAS_DLOSSES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row * labels_stride)
    counts = label != ignore_index
    kept = counts & (label >= 0) & (label < vocab)
    wrong = counts & (kept == 0)
    mass = tl.load(weight_sum) if HAS_WEIGHT else vocab * 1.0
    logits += row * logits_stride
    loss, maximum, total = _losses(
        logits, label, kept, wrong, weight, mass, vocab,
        smoothing, scale, softcap, HAS_WEIGHT, SMOOTHING, SOFTCAP, BLOCK,
    )  # fmt: skip
    tl.store(losses + row, loss)
    dloss = 1.0
    if HAS_DLOSSES:
        dloss = tl.load(dlosses + row * dlosses_stride).to(tl.float32)
    for start in range(0, vocab, BLOCK):
        _gradient(
            logits, logits, start + tl.arange(0, BLOCK), label, kept, wrong, weight, mass, vocab,
            maximum, total, dloss, smoothing, scale, softcap,
            HAS_WEIGHT, SMOOTHING, SOFTCAP,
        )  # fmt: skip


def _warps(block: int) -> int:
    return max(1, block // 512)


def _prepared(weight, numbers, vocab):
    """Class weights as float32 with their sum; the numbers and constants of a launch."""
    weights = (None, None)
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
        weights = weight, weight.sum()
    smoothing, softcap, scale = numbers
    block = min(BLOCK, next_power_of_2(vocab))
    constants = {
        "HAS_WEIGHT": weight is not None, "SMOOTHING": smoothing != 0, "SOFTCAP": softcap != 0,
        "BLOCK": block, "num_warps": _warps(block),
    }  # fmt: skip
    return weights, (smoothing, scale, softcap), constants


def cross_entropy(logits, labels, weight, ignore_index, numbers):
    logits = rows_of(logits)
    rows, vocab = logits.shape
    if vocab == 0:
        return logits.new_zeros(rows, dtype=torch.float32), logits.new_zeros(
            rows, 2, dtype=torch.float32
        )
    losses = logits.new_empty(rows, dtype=torch.float32)
    stats = logits.new_empty(rows, 2, dtype=torch.float32)
    if rows:
        weights, floats, constants = _prepared(weight, numbers, vocab)
        with on_device(logits):
            _forward[(rows,)](
                logits, labels, *weights, losses, stats,
                logits.stride(0), labels.stride(0), vocab, ignore_index, *floats, **constants,
            )  # fmt: skip
    return losses, stats


def cross_entropy_backward(dlosses, logits, labels, weight, stats, ignore_index, numbers):
    logits, stats = rows_of(logits), stats.contiguous()
    rows, vocab = logits.shape
    dlogits = logits.new_empty(rows, vocab)
    if rows and vocab:
        weights, floats, constants = _prepared(weight, numbers, vocab)
        pieces = triton.cdiv(vocab, constants["BLOCK"])
        with on_device(logits):
            _backward[(rows * pieces,)](
                dlosses, logits, labels, *weights, stats, dlogits,
                dlosses.stride(0), logits.stride(0), labels.stride(0), pieces, vocab,
                ignore_index, *floats, **constants,
            )  # fmt: skip
    return dlogits


def cross_entropy_in_place(logits, labels, weight, dlosses, ignore_index, numbers):
    dense = rows_of(logits)
    rows, vocab = dense.shape
    losses = (logits.new_empty if vocab else logits.new_zeros)(rows, dtype=torch.float32)
    if rows and vocab:
        weights, floats, constants = _prepared(weight, numbers, vocab)
        with on_device(logits):
            _in_place[(rows,)](
                dlosses, dense, labels, *weights, losses,
                0 if dlosses is None else dlosses.stride(0), dense.stride(0), labels.stride(0),
                vocab, ignore_index, *floats, HAS_DLOSSES=dlosses is not None, **constants,
            )  # fmt: skip
        if dense is not logits:
            logits.copy_(dense)
    return losses


def configurations() -> Iterator[Configuration]:
    """Everything on for every architecture; the plain loss, and small blocks, for some."""
    for dtype, name in NAMES.items():
        architectures = BFLOAT16 if dtype is torch.bfloat16 else ARCHITECTURES
        ends = architectures[:: len(architectures) - 1]
        yield from _configurations(name, BLOCK, True, architectures if name == "fp16" else ends)
        yield from _configurations(name, BLOCK, False, ends)
        yield from _configurations(name, 64, True, ends[:1])


def _configurations(name, block, everything, architectures):
    p, f = f"*{name}", "*fp32"
    pointers = {
        "dlosses": f, "logits": p, "labels": "*i64", "weight": f, "weight_sum": f, "losses": f,
        "stats": f, "dlogits": p,
    }  # fmt: skip
    numbers = {
        "dlosses_stride": "i64", "logits_stride": "i64", "labels_stride": "i64", "pieces": "i32",
        "vocab": "i32", "ignore_index": "i64",
        **dict.fromkeys(("smoothing", "scale", "softcap"), "fp32"),
    }  # fmt: skip
    constants = dict.fromkeys(("HAS_DLOSSES", "HAS_WEIGHT", "SMOOTHING", "SOFTCAP"), everything)
    for kernel in (_forward, _backward, _in_place):
        if kernel is _backward and block != BLOCK:
            continue
        yield Configuration(
            kernel,
            {n: t for n, t in {**pointers, **numbers}.items() if n in kernel.arg_names},
            {n: c for n, c in {**constants, "BLOCK": block}.items() if n in kernel.arg_names},
            _warps(block), architectures=architectures, registers=128,
            multiples=("logits_stride", "vocab"),
            label=f"{name} {block} {'all' if everything else 'plain'}",
        )  # fmt: skip
