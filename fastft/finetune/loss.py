"""The loss of a task from a command's settings: make(config, labels) for Trainer.

Always given to Trainer for classes and tags, weighted or not: transformers' own heads count a
step's batches one by one, and their gradient grows with gradient accumulation (transformers#47688).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fastft.finetune import UserError, need
from fastft.finetune.data import IGNORED
from fastft.losses import ClassificationLoss


class Settings(Protocol):
    """What `make` reads of a command's settings."""

    task: str
    class_weights: Literal["none", "balanced"]
    label_smoothing: float
    focal_gamma: float


def make(
    config: Settings, labels: Iterable[Any] | None = None, *, names: list[str] | None = None,
    multi_label: bool = False,
) -> Callable[..., Any] | None:  # fmt: skip
    """Trainer's compute_loss_func: loss(outputs, labels, num_items_in_batch=None) -> Tensor ().

    labels: of the training data, where class_weights is "balanced": one class per row, a list of
    tags per row (-100 ignored), or with multi_label a row of 0 and 1 per class. names: the classes.
    "balanced" weighs class c by items / (classes * items of c), as scikit-learn does, and in
    multi-label data the presence of c by rows without c / rows with c.

    None for a language model without label smoothing, whose own loss is right.
    Raises: UserError for settings that do not go together, or a class without an example.
    """
    if config.focal_gamma and config.label_smoothing:
        raise UserError("focal_gamma and label_smoothing do not go together")
    if config.task in ("lm", "sft"):
        if config.focal_gamma or config.class_weights != "none":
            raise UserError(f"class_weights and focal_gamma are for classes, not for {config.task}")
        smoothing = config.label_smoothing
        return NextTokenLoss(ClassificationLoss(label_smoothing=smoothing)) if smoothing else None
    weights = None
    if config.class_weights == "balanced":
        if labels is None:
            raise UserError("class_weights: balanced needs the labels of the training data")
        weigh = _balanced_presence if multi_label else _balanced
        weights = weigh(labels, names)
    kind = MultiLabelLoss if multi_label else ClassificationLoss
    return kind(weights, label_smoothing=config.label_smoothing, focal_gamma=config.focal_gamma)


def _balanced(labels: Iterable[Any], names: list[str] | None) -> list[float]:
    utils = need("sklearn.utils.class_weight", "class_weights: balanced")
    rows = [np.atleast_1d(np.asarray(row)) for row in labels]
    items = np.concatenate(rows) if rows else np.empty(0, int)
    items = items[items != IGNORED].astype(int)
    _need_all(np.bincount(items, minlength=len(names or ())), names)
    classes = np.unique(items)
    out: list[float] = utils.compute_class_weight("balanced", classes=classes, y=items).tolist()
    return out


def _balanced_presence(labels: Iterable[Any], names: list[str] | None) -> list[float]:
    rows = np.asarray(list(labels), dtype=float)  # (rows, classes)
    present = (rows > 0.5).sum(0)
    _need_all(present, names)
    _need_all(len(rows) - present, names, "without")
    out: list[float] = ((len(rows) - present) / present).tolist()
    return out


def _need_all(counts: np.ndarray, names: list[str] | None, which: str = "of") -> None:
    if not counts.size:
        raise UserError("class_weights: balanced: no labelled training example")
    for i in np.flatnonzero(counts == 0):
        name = names[i] if names else i
        raise UserError(f"class_weights: balanced: no training example {which} class {name}")


@dataclass(frozen=True)
class NextTokenLoss:
    """A loss of classes for the tokens of a language model, each predicted by those before it.

    Smoothed in training steps alone: a perplexity is of the labels as they are.
    """

    loss: ClassificationLoss

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """outputs: with logits (rows, tokens, vocabulary); labels: (rows, tokens), not shifted."""
        # Prompt tuning puts the logits of its virtual tokens before those of the text.
        logits = outputs["logits"][:, -labels.shape[1] : -1]
        loss = self.loss if torch.is_grad_enabled() else replace(self.loss, label_smoothing=0.0)
        return loss(logits, labels[:, 1:], num_items_in_batch)


@dataclass(frozen=True)
class MultiLabelLoss:
    """Binary cross entropy of every class by itself, as Trainer's `compute_loss_func`.

    With p the probability of a class, y its label (0 or 1) smoothed to y' = y (1 - eps) + eps / 2
    and w the weight of its presence:

        l = -w y' log p - (1 - y') log(1 - p)
        focal  l = -w y (1 - p)^gamma log p - (1 - y) p^gamma log(1 - p)     (arXiv 1708.02002)

    averaged over rows and classes: over `num_items_in_batch` where Trainer gives it, which counts
    both. Logits in half types are taken to float32.
    """

    presence_weights: list[float] | None = None  # (classes,)
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """outputs: a model's, or its logits (rows, classes); labels: (rows, classes) of 0 and 1."""
        logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
        if logits.shape != labels.shape:
            raise ValueError(
                f"labels: expected shape {tuple(logits.shape)}, got {tuple(labels.shape)}"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits)
        smoothed = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        given = self.presence_weights
        weights = None if given is None else logits.new_tensor(given)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, smoothed, pos_weight=weights, reduction="none"
        )
        if self.focal_gamma:
            # Of a certain prediction the missed part is 0, whose power has no derivative there.
            missed = torch.sigmoid(logits * (1 - 2 * labels))
            losses = losses * missed.clamp_min(torch.finfo(losses.dtype).tiny) ** self.focal_gamma
        return losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)
