"""What the kernels share: launch sizes, and the description of one compiled form of a kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

# Compute capabilities the kernels are meant for: T4, A100, RTX 30, RTX 40, H100, B200, RTX 50.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# bfloat16 arithmetic begins with Ampere.
BFLOAT16 = ARCHITECTURES[1:]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Configuration:
    """A kernel with the types of its arguments and its constants: what the compiler is given."""

    kernel: Callable
    signature: dict[str, str]  # argument -> Triton's name of its type
    constants: dict  # constexpr argument -> value
    warps: int = 4
    stages: int = 3
    architectures: tuple[int, ...] = ARCHITECTURES
    # A kernel that needs more registers than this, or more bytes of stack, is a regression.
    registers: int = 255
    stack: int = 0
    label: str = ""


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(1, n))


def warps_for(block: int) -> int:
    """Warps of a program that holds one block of a row: some 8 elements per thread."""
    return min(16, max(1, block // 256))


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device."""
    if x.device.type != "cuda":  # the interpreter
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def on_device(x: Tensor):
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, last dimension), elements side by side: a view unless the layout forbids one."""
    if x.dim() != 2:
        # Counted, because reshape cannot tell -1 of a tensor without elements.
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
