"""Modules that other libraries made: their type, and what is read of several of them.

Annotations of torch call every attribute of a module `Tensor | Module`, a config and a list of
adapters too. A room of patch/ or decode/ that has recognised a module reads the attributes it was
recognised by; `nn.Module` is the type wherever none of them is read.
"""

import sys
from typing import Any, TypeAlias, TypeGuard

from torch import nn

ForeignModule: TypeAlias = Any


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in, out)."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and type(module) is utils.Conv1D


def is_lora(module: nn.Module) -> TypeGuard[ForeignModule]:
    """Whether it is a LoRA layer of PEFT's."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and isinstance(module, layers.LoraLayer)


def eps_of(norm: nn.Module) -> float | None:
    """What a norm adds to the mean square or variance, under any of its names; None if nothing."""
    names = ("variance_epsilon", "eps", "epsilon", "norm_eps")
    return next((v for n in names if isinstance(v := getattr(norm, n, None), float)), None)
