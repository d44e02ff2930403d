"""Holds gradient checkpointing to what the forward ran.

Reentrant checkpointing runs a layer without gradients, and again in backward with whatever forward
and attention it has by then. Those of an unpatched model would let packed rows see each other and
draw other dropout, and nothing would tell. (The other kind compares what it has saved.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule
from fastft.patch.swap import swap_of


class _Held(torch.autograd.Function):
    """The identity; its backward comes before that of the layers below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, attention: Any) -> Tensor:
        ctx.module, ctx.attention = module, attention
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        record = swap_of(ctx.module)
        same = ctx.module.config._attn_implementation == ctx.attention
        if record is None or not record.active or not same:
            raise RuntimeError(
                f"{type(ctx.module).__name__} was unpatched between forward and backward, or given "
                "another attention: gradient checkpointing would compute its layers again by other "
                "means. Call backward first"
            )
        return grad, None, None


def held(module: ForeignModule, output: Any) -> Any:
    """The output of a base model, a tuple or a ModelOutput, whose backward raises RuntimeError
    if the module is then no longer patched as it is now."""
    attention = module.config._attn_implementation

    def hold(x: Tensor) -> Any:
        is_result = isinstance(x, Tensor) and x.requires_grad
        return _Held.apply(x, module, attention) if is_result else x

    if isinstance(output, tuple):
        return tuple(map(hold, output))
    for name, value in output.items():
        output[name] = hold(value)
    return output
