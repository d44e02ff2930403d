"""Heads that `patch` leaves alone, over a base model that leaves padding out: they run as they are,
and the padding is computed wherever they may read it."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fastft.decode.evaluating import evaluating
from fastft.foreign import ForeignModule
from fastft.patch import causal_lm, heads, padding
from fastft.patch.confirm import undisturbed
from fastft.patch.labels import count_padding
from fastft.patch.packing import kept
from fastft.patch.pretrained import is_pretrained
from fastft.patch.swap import original_forward, swap, swap_of


def is_candidate(module: nn.Module) -> bool:
    """A model of transformers with a loss, which names no base model."""
    return is_pretrained(module) and "labels" in inspect.signature(type(module).forward).parameters


def guard(module: nn.Module) -> None:
    """Swaps the forward of a head that is not known."""
    if not any(_leaves_padding_out(child) for child in module.modules()):
        return
    swap(module, "own_head", forward, not _works_by_place(module))


def _leaves_padding_out(module: nn.Module) -> bool:
    found = swap_of(module)
    return found is not None and found.operator == "padding"


def _works_by_place(module: nn.Module) -> bool:
    """Whether scores at real tokens read nothing of padded places."""
    if causal_lm.is_candidate(module):
        return True
    if not type(module).forward.__module__.startswith("transformers."):
        return True  # a head of the user's own, which is told to weigh by the mask
    try:
        with undisturbed(), torch.no_grad(), evaluating(module):
            return not heads.reads_padding(module)
    except Exception:  # it asks for arguments we do not know
        return False


def forward(module: ForeignModule, *args: Any, **kwargs: Any) -> Any:
    reads_padding = module._fastft_swap.options
    if torch.compiler.is_compiling():
        return original_forward(module)(*args, **kwargs)
    keeps = reads_padding or count_padding(padding.bind(module, args, kwargs))
    with kept() if keeps else nullcontext():
        return original_forward(module)(*args, **kwargs)
