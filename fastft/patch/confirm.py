"""Confirms a replacement by behaviour: original and replacement run on the same small random input.

A module is tried through a stand-in of its class with small random float32 parameters, forward and
backward; the module itself, the random state and gradients stay as they were. What disagrees is
left alone and reported with its difference, so a new release of a model cannot become wrong.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastft.patch.swap import origin

# float32 arithmetic in another order on tiny inputs; a different formula is off by far more.
TOLERANCE = 1e-4


class Unlike(Exception):
    """The module is not what it looked like; the message says how."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the random state, grad mode and autocast of the caller as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        yield


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Inside, hooks do not run: they were hung for the user's inputs, not for ours.

    PyTorch's own do: some compute the weights. The dictionaries stay, for their handles' sake, and
    what a forward adds to them remains.
    """
    hidden = []
    try:
        for module in model.modules():
            for hooks in (getattr(module, name) for name in _HOOKS):
                if hooks:
                    hidden.append((hooks, dict(hooks)))
                    for key in [k for k, h in hooks.items() if not origin(h).startswith("torch.")]:
                        del hooks[key]
        yield
    finally:
        for hooks, before in hidden:
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(before | added)


def stand_in(module: nn.Module, parameters: dict[str, Any], children: dict[str, Any]) -> nn.Module:
    """An instance of the module's class with other parameters and children, and no hooks.

    It trains, and so do children without weights: dropout must show, also where a model that is
    patched in evaluation mode is trained later.
    """
    other = _training(module)
    for name, value in list(other.__dict__.items()):
        if name.endswith("_hooks") and isinstance(value, dict):
            other.__dict__[name] = type(value)()
    other.__dict__.pop("forward", None)
    other.__dict__.pop("_fastft_swap", None)
    other.__dict__["_parameters"] = dict(parameters)
    other.__dict__["_modules"] = {
        name: _training(child) if is_weightless(child) else child
        for name, child in children.items()
    }
    return other


def _training(module: nn.Module) -> nn.Module:
    """A copy, in training mode, that shares what the module holds."""
    # Not copy.copy: FSDP's classes make their instances by calling __init__.
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__, training=True)
    return other


def is_weightless(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether it has neither parameters nor children, as activations and dropout have none."""
    return module is not None and not module._parameters and not module._modules


def difference(
    original: Callable[..., Any], replacement: Callable[..., Any], inputs: Sequence[Tensor]
) -> float:
    """Largest relative difference of outputs and of the gradients of `inputs`."""
    results = []
    for function in (original, replacement):
        copies = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*copies)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o) for o in outs]
        loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True))
        results.append([*outs, *torch.autograd.grad(loss, copies)])
    worst = 0.0
    for a, b in zip(*results, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Unlike(f"gives {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}")
        worst = max(worst, relative(a, b))
    return worst


def gap(a: Tensor, b: Tensor) -> float:
    """|a - b|; where both have the same infinity, or NaN, it is 0, and infinite where one has."""
    a, b = a.double(), b.double()
    found: float = (a - b).norm().item()
    if math.isfinite(found):
        return found
    same = (a == b) | (a.isnan() & b.isnan())
    found = (a - b).masked_fill(same, 0).norm().item()
    return found if math.isfinite(found) else math.inf


def size(x: Tensor) -> float:
    """|x|, of its finite values."""
    found: float = x.double().nan_to_num(0, 0, 0).norm().item()
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """gap(a, b) / size(b), and 0 for two zeros."""
    apart = gap(a, b)
    if apart == 0:
        return 0.0
    of = size(b)
    return apart / of if of > 0 else math.inf


def confirm(
    original: Callable[..., Any], replacement: Callable[..., Any], inputs: Sequence[Tensor]
) -> None:
    """Raises Unlike unless both compute the same."""
    with undisturbed():
        try:
            worst = difference(original, replacement, inputs)
        except Unlike:
            raise
        except Exception as error:  # the original's forward may ask for anything at all
            raise Unlike(f"could not be tried ({type(error).__name__}: {error})") from error
    if not worst <= TOLERANCE:
        raise Unlike(f"computes something else (relative difference {worst:.2g})")
