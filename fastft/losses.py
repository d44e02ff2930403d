"""Losses for `Trainer(compute_loss_func=…)`: class weights, label smoothing, focal loss.

They are averaged over the items of a whole step, however many batches it is accumulated from, which
neither transformers' heads nor `TrainingArguments.label_smoothing_factor` are (transformers#47688).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.ops.cross_entropy import cross_entropy


@dataclass(frozen=True)
class ClassificationLoss:
    """The loss of classes, of rows or of tokens, as Trainer's `compute_loss_func`.

    With p the probabilities, y the label, w the class weights and eps the label smoothing:

        smoothed   l = -(1 - eps) w_y log p_y - eps / classes * sum over j of w_j log p_j
        focal      l = -w_y (1 - p_y)^gamma log p_y                           (arXiv 1708.02002)

    averaged over the items that are not ignored: over `num_items_in_batch` where Trainer gives it,
    else over their own number, or with class weights the sum of their weights, as PyTorch does.

        weights = sklearn.utils.class_weight.compute_class_weight("balanced", classes=…, y=…)
        Trainer(…, compute_loss_func=fastft.losses.ClassificationLoss(weights))
    """

    class_weights: Sequence[float] | Tensor | None = None  # (classes,)
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0  # 0: no focal loss; usual is 2
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not self.focal_gamma >= 0.0:
            raise ValueError(f"focal_gamma: expected 0 or more, got {self.focal_gamma}")
        if self.focal_gamma and self.label_smoothing:
            raise ValueError("focal_gamma: expected 0 with label smoothing: their sum is no loss")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected 0 to 1, got {self.label_smoothing}")
        if self.class_weights is not None:
            weights = torch.as_tensor(self.class_weights, dtype=torch.float32)
            if weights.dim() != 1 or not bool((weights >= 0).all()):
                raise ValueError(
                    "class_weights: expected one number of 0 or more for each class, "
                    f"got {self.class_weights}"
                )
            object.__setattr__(self, "class_weights", weights)

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """outputs: a model's, or its logits (..., classes); labels: (...) int64."""
        logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
        labels = labels.to(logits.device)
        weights = self.class_weights
        if weights is not None:
            weights = torch.as_tensor(weights, device=logits.device)
        options: dict[str, Any] = {"weight": weights, "ignore_index": self.ignore_index}
        if not self.focal_gamma:
            return cross_entropy(
                logits, labels, num_items=num_items_in_batch,
                label_smoothing=self.label_smoothing, **options,
            )  # fmt: skip
        own = cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="none")
        # Of a loss of 0, 1 - p is 0, whose power has no derivative there where gamma is below 1.
        missed = -torch.expm1(-own)
        losses = own * missed.clamp_min(torch.finfo(own.dtype).tiny) ** self.focal_gamma
        kept = labels != self.ignore_index
        weight = kept.to(losses.dtype)
        if weights is not None:
            weight = weight * weights[torch.where(kept, labels, 0)]
        divisor = weight.sum() if num_items_in_batch is None else num_items_in_batch
        # Without any item the sum is 0, and so is the loss.
        return (losses * weight).sum() / torch.where(kept.any(), divisor, 1)
