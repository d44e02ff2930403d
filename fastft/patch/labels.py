"""Which places of a padded batch a loss counts, by its labels."""

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


def targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int = IGNORED) -> Tensor:
    """(batch, length): the label that each place of a causal model predicts."""
    if shift_labels is not None:
        return shift_labels
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def count_padding(arguments: dict[str, Any]) -> bool:
    """Whether a padded place has a label or predicts one, as that in front of a left-padded row."""
    labels, mask = arguments.get("labels"), arguments.get("attention_mask")
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor):
        return False
    if labels.dim() != 2 or mask.shape != labels.shape or labels.dtype is not torch.int64:
        return False
    ignore_index = arguments.get("ignore_index", IGNORED)
    predicted = targets(labels, arguments.get("shift_labels"), ignore_index).to(labels.device)
    counts = (labels != ignore_index) | (predicted != ignore_index)
    return bool((counts & (mask == 0).to(counts.device)).any())
