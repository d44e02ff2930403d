"""One swapped `forward`: bound to the instance, undone exactly, passed through when switched off.

Nothing but the instance changes: its `forward` attribute and one attribute of ours, `_fastft_swap`,
which travel with `copy.deepcopy` and stay out of `state_dict`. Classes are never touched.
"""

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MethodType
from typing import Any, NoReturn, cast

from torch import nn

from fastft.foreign import ForeignModule


@dataclass(eq=False)
class Swap:
    """What runs in place of an instance's forward, and what ran before."""

    operator: str
    replacement: Callable[..., Any]  # replacement(module, *args, **kwargs)
    options: Any = None
    # A forward the instance had of its own; None: its class's.
    original: Callable[..., Any] | None = None
    active: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Swap":
        # The original may be bound to the module that is being copied.
        return replace(self, original=copy.deepcopy(self.original, memo))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a patched module cannot be pickled: unpatch it first, or save its state_dict"
        )


@cache
def _trampoline(cls: Any) -> Callable[..., Any]:
    """A forward of the class's signature: Trainer and generate read it to learn the arguments."""

    def forward(self: ForeignModule, *args: Any, **kwargs: Any) -> Any:
        swap = self._fastft_swap
        if swap.active:
            return swap.replacement(self, *args, **kwargs)
        return original_forward(self)(*args, **kwargs)

    # Not functools.wraps: accelerate unwinds __wrapped__ and would drop the swap.
    told = {"__signature__": inspect.signature(cls.forward), "is_fastft": True}
    vars(forward).update(told)
    return forward


def swap(
    module: ForeignModule, operator: str, replacement: Callable[..., Any], options: Any = None
) -> None:
    """Puts replacement(module, …) in place of the instance's forward."""
    module._fastft_swap = Swap(operator, replacement, options, module.__dict__.get("forward"))
    module.forward = MethodType(_trampoline(cast(Hashable, type(module))), module)


def swap_of(module: ForeignModule) -> Swap | None:
    found: Swap | None = module.__dict__.get("_fastft_swap")
    return found


def original_forward(module: ForeignModule) -> Callable[..., Any]:
    """The forward that ran before the swap, bound to this module."""
    before: Callable[..., Any] | None = module._fastft_swap.original
    # partial rather than MethodType, which torch.compile cannot trace.
    return before if before is not None else partial(type(module).forward, module)


def has_own_forward(module: nn.Module) -> bool:
    """Somebody, and not we, has replaced this instance's forward."""
    return "forward" in module.__dict__ and not _is_ours(module)


def _is_ours(module: nn.Module) -> bool:
    # By a mark: FSDP and parametrizations give a module another class after it was patched.
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return getattr(function, "is_fastft", False)


def undo(module: nn.Module) -> str | None:
    """Gives the forward back; where others have stacked theirs on top, only switches ours off."""
    record = swap_of(module)
    if record is None:
        return None
    if not _is_ours(module):
        record.active = False
        return "its forward was wrapped again after patching: switched off rather than removed"
    if record.original is None:
        del module.forward
    else:
        module.forward = record.original
    del module._fastft_swap
    return None


@contextmanager
def switched_off(model: ForeignModule) -> Iterator[None]:
    """Runs the original computation inside the block, then the patched one again."""
    from fastft.patch.attention import NAME  # a file that imports this one

    records = [r for r in map(swap_of, model.modules()) if r is not None and r.active]
    attending = [
        module
        for module in model.modules()
        if "_fastft_attention_before" in vars(module) and module.config._attn_implementation == NAME
    ]
    try:
        for record in records:
            record.active = False
        for module in attending:
            module.config._attn_implementation_internal = module._fastft_attention_before
        yield
    finally:
        for record in records:
            record.active = True
        for module in attending:
            module.config._attn_implementation_internal = NAME


def is_hooked(module: nn.Module) -> bool:
    """Hooks run only through `module(...)`: a swap that reads its weights would leave them out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def origin(hook: Callable[..., Any]) -> str:
    """The module that defines a hook, which may be a function, a partial or an instance."""
    return getattr(getattr(hook, "func", hook), "__module__", None) or ""
