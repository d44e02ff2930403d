"""cross_entropy: the loss of every row of logits, as torch.nn.functional.cross_entropy defines it.

    z = c tanh(s u / c)                       u: logits, s: logit scale, c: softcap; z = s u without
    l = logsumexp(z), p = e^(z - l)
    loss = (1 - eps) w_y (l - z_y) + eps / vocab * sum_j w_j (l - z_j)
    dz_j = ((1 - eps) w_y + eps / vocab * sum w) p_j - (1 - eps) w_y [j = y] - eps / vocab * w_j
    du = dz s (1 - (z / c)^2)

for the label y, the label smoothing eps and the class weights w, 1 without. Ignored rows have no
loss and no gradient. Logits are (rows, vocab), losses float32, whatever the logits are. One read of
the logits gives every row's maximum and its sum of exponentials, which the backward starts from.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.library import first_derivatives_only, implement_in_triton, operator, rows_of


@dataclass(frozen=True)
class LossOptions:
    """How rows become a loss; the meaning is torch.nn.functional.cross_entropy's.

    softcap bounds the logits to (-softcap, softcap) by a tanh before the loss.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected 0 to 1, got {self.label_smoothing}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap: expected a positive number or None, got {self.softcap}")
        if self.reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {self.reduction!r}")

    def numbers(self, logit_scale: float = 1.0) -> list[float]:
        """What the raw operators take: label smoothing, softcap (0: none), logit scale."""
        return [float(self.label_smoothing), float(self.softcap or 0.0), float(logit_scale)]


def _seen(logits: Tensor, numbers: list[float]) -> Tensor:
    _, softcap, scale = numbers
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def _targets(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows count, and labels that are safe to index with."""
    kept = labels != ignore_index
    return kept, torch.where(kept, labels, 0)


@operator(
    "cross_entropy(Tensor logits, Tensor labels, Tensor? weight, int ignore_index,"
    " float[] numbers) -> (Tensor losses, Tensor stats)"
)
def _cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    z, smoothing = _seen(logits, numbers), numbers[0]
    rows, vocab = z.shape
    if vocab == 0:
        return z.new_zeros(rows), z.new_zeros(rows, 2)
    kept, target = _targets(labels, ignore_index)
    weight = z.new_ones(vocab) if weight is None else weight.to(z.dtype)
    maximum = z.amax(1)
    shifted = z - maximum[:, None]
    total = shifted.exp().sum(1)
    logarithm = total.log()
    own = logarithm - shifted.gather(1, target[:, None])[:, 0]
    losses = (1 - smoothing) * weight[target] * own
    if smoothing:
        losses = losses + smoothing / vocab * (weight.sum() * logarithm - shifted @ weight)
    return torch.where(kept, losses, 0.0), torch.stack((maximum, total), 1)


@operator(
    "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor? weight,"
    " Tensor stats, int ignore_index, float[] numbers) -> Tensor dlogits"
)
def _cross_entropy_backward(
    dlosses: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    numbers: list[float],
) -> Tensor:
    z, (smoothing, softcap, scale) = _seen(logits, numbers), numbers
    rows, vocab = z.shape
    if vocab == 0:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    kept, target = _targets(labels, ignore_index)
    weight = z.new_ones(vocab) if weight is None else weight.to(z.dtype)
    own = (1 - smoothing) * weight[target]
    mass = own + smoothing / vocab * weight.sum()
    grad = mass[:, None] * (z - stats[:, :1]).exp() / stats[:, 1:] - smoothing / vocab * weight
    grad = grad.scatter_add(1, target[:, None], -own[:, None])
    if softcap:
        grad = grad * (1 - (z / softcap).square())
    grad = grad * (scale * dlosses.to(z.dtype))[:, None]
    return torch.where(kept[:, None], grad, 0.0).to(logits.dtype).contiguous()


@operator(
    "cross_entropy_in_place(Tensor(a!) logits, Tensor labels, Tensor? weight, Tensor? dlosses,"
    " int ignore_index, float[] numbers) -> Tensor losses"
)
def _cross_entropy_in_place(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    dlosses: Tensor | None,
    ignore_index: int,
    numbers: list[float],
) -> Tensor:
    """The losses; the logits, which must be private, become their own gradient."""
    losses: Tensor
    losses, stats = _cross_entropy.reference(logits, labels, weight, ignore_index, numbers)
    dlosses = torch.ones_like(losses) if dlosses is None else dlosses
    logits.copy_(
        _cross_entropy_backward.reference(
            dlosses, logits, labels, weight, stats, ignore_index, numbers
        )
    )
    return losses


implement_in_triton(
    "cross_entropy", _cross_entropy, _cross_entropy_backward, _cross_entropy_in_place
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        numbers: list[float],
    ) -> Tensor:
        # logits: (rows, vocab)
        losses, stats = _cross_entropy(logits, labels, weight, ignore_index, numbers)
        ctx.save_for_backward(logits, labels, weight, stats)
        ctx.ignore_index, ctx.numbers = ignore_index, numbers
        return losses

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, weight, stats = ctx.saved_tensors
        dlogits = _cross_entropy_backward(
            dlosses, logits, labels, weight, stats, ctx.ignore_index, ctx.numbers
        )
        return dlogits, None, None, None, None


def check_labels(labels: Tensor, ignore_index: int, shape: tuple[Any, ...], vocab: int) -> None:
    """Raises where labels are not `shape` class indices below `vocab`, or ignored.

    Values are read on the CPU only, and not while tracing: the kernels read them again.
    """
    if labels.dtype is not torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"labels: expected shape {tuple(shape)}, got {tuple(labels.shape)}")
    if not torch.compiler.is_compiling() and labels.is_cpu:
        refuse_wrong_labels(labels, ignore_index, vocab)


def refuse_wrong_labels(labels: Tensor, ignore_index: int, vocab: int) -> None:
    """Reads the labels' values, for which the host waits."""
    if labels.numel() == 0:
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"labels: expected 0 to {vocab - 1}, or ignore_index {ignore_index}, "
            f"got {labels[position].item()} at position {', '.join(map(str, position))}"
        )


def check_weight(
    weight: Tensor | None, num_items: Tensor | float | None, reduction: str, vocab: int
) -> None:
    """Raises where the class weights or num_items do not fit the loss."""
    if weight is not None and weight.shape != (vocab,):
        raise ValueError(f"weight: expected shape ({vocab},), got {tuple(weight.shape)}")
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a tensor that needs no gradient: it gets none")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: expected reduction 'mean' with it, got {reduction!r}")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items: expected one number, got shape {tuple(num_items.shape)}")


def averaged(
    total: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    num_items: Tensor | float | None,
    ignore_index: int,
) -> Tensor:
    """The sum over num_items, or the labelled rows, or their class weights; 0 without such rows."""
    kept, target = _targets(labels, ignore_index)
    if isinstance(num_items, Tensor):
        divisor = num_items.detach().reshape(()).to(total.device, total.dtype)
    elif num_items is not None:
        divisor = total.new_full((), float(num_items))
    elif weight is not None and weight.numel():
        # Clamped, because compiled code may index before the operator has refused a wrong label.
        target = target.clamp(0, weight.numel() - 1)
        divisor = (weight.detach().to(total.dtype)[target] * kept).sum()
    else:
        divisor = kept.sum().to(total.dtype)
    return total / torch.where(kept.any(), divisor, 1.0)


def cross_entropy(
    logits: Tensor,  # (..., vocab)
    labels: Tensor,  # (...) int64
    *,
    weight: Tensor | None = None,  # (vocab,)
    num_items: Tensor | float | None = None,
    **options: Any,
) -> Tensor:
    """The loss of logits against labels; torch.nn.functional.cross_entropy's definition.

    Args: weight holds class weights, constants of the loss. With num_items, the loss is the sum
    over num_items rather than the mean over labelled rows. options are LossOptions' fields:
    ignore_index=-100, label_smoothing=0.0, softcap=None, reduction="mean".
    Returns: float32 (float64 for float64 logits): a scalar, or for reduction "none" one loss per
    label. Without any labelled row the loss is 0, and so is its gradient.
    Raises: ValueError or TypeError that names the argument. On GPUs the host does not wait for the
    labels: the loss of one outside the vocabulary is NaN, and so is its gradient.
    """
    chosen = LossOptions(**options)
    if logits.dim() == 0 or not logits.is_floating_point():
        raise TypeError(
            "logits: expected floating-point (..., vocab), "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    check_labels(labels, chosen.ignore_index, logits.shape[:-1], logits.shape[-1])
    check_weight(weight, num_items, chosen.reduction, logits.shape[-1])
    flat = labels.reshape(-1)
    losses: Tensor = _CrossEntropy.apply(
        rows_of(logits), flat, weight, chosen.ignore_index, chosen.numbers()
    )
    if chosen.reduction == "none":
        return losses.view(labels.shape)
    if chosen.reduction == "sum":
        return losses.sum()
    return averaged(losses.sum(), flat, weight, num_items, chosen.ignore_index)
