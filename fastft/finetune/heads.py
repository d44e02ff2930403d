"""Heads that learn more classes: rows for them behind those of the classes that they know."""

from collections.abc import Sequence

import torch
from torch import nn

from fastft.finetune import UserError
from fastft.finetune.methods import layers
from fastft.foreign import ForeignModule


def grows(known: list[str] | None, labels: Sequence[str] | None) -> bool:
    """Whether labels are the known classes and others behind them."""
    if known is None or labels is None:
        return False
    return len(labels) > len(known) and known == list(labels[: len(known)])


def grow(model: ForeignModule, task: str, count: int) -> None:
    """count classes in place of fewer; what is computed for the old ones stays as it is.

    Raises: UserError for a head that does not end in a linear layer.
    """
    heads = tuple(f"{name}." for name in layers.head(model, task))
    ends = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and f"{name}.".startswith(heads)
    ]
    if not ends:
        raise UserError(
            f"{type(model).__name__} has no linear layer of its {model.config.num_labels} classes "
            "that could learn others beside them"
        )
    name, old = ends[-1]
    grown = nn.Linear(
        old.in_features, count, old.bias is not None, old.weight.device, old.weight.dtype
    )
    model._init_weights(grown)  # as the model draws a new head
    with torch.no_grad():
        grown.weight[: old.out_features] = old.weight
        if old.bias is not None:
            grown.bias[: old.out_features] = old.bias
    model.set_submodule(name, grown)
    model.num_labels = count
