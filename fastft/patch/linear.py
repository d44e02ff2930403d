"""Swaps torch.nn.Linear where float32 products have a faster library than PyTorch's choice."""

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule
from fastft.ops import gemm
from fastft.ops.linear import linear
from fastft.patch.swap import original_forward


def is_candidate(module: nn.Module) -> bool:
    """A float32 linear layer on a CPU where oneDNN is the faster library; no subclass."""
    return (
        type(module) is nn.Linear
        and module.weight.is_cpu
        and module.weight.dtype is torch.float32
        and gemm.float32_library() == "oneDNN"
    )


def recognise(module: nn.Module) -> None:
    """Known by its class, which is PyTorch's own."""


def forward(module: ForeignModule, input: Tensor) -> Tensor:  # as nn.Linear names it
    if torch.compiler.is_compiling():  # the compiler fuses what comes after its own product
        out: Tensor = original_forward(module)(input)
        return out
    return linear(input, module.weight, module.bias)
