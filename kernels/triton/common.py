"""What the kernels share: launch sizes, and the description of one compiled form of a kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
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
    # A kernel that needs more registers than this, or more bytes of stack, is a regression. A stack
    # of None: never launched on rows that are not aligned.
    registers: int = 255
    stack: int | None = 0
    # The same where pointers and these integers are multiples of 16, as in usual models: loads are
    # then of 16 bytes.
    multiples: tuple[str, ...] = ()
    aligned_stack: int = 0
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


def capability(x: Tensor) -> int:
    """Compute capability of x's device, 90 for instance."""
    if x.device.type != "cuda":  # the interpreter
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def on_device(x: Tensor):
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, last dimension), elements side by side: a view unless the layout forbids one."""
    if x.dim() != 2:
        # Counted, because reshape cannot tell -1 of a tensor without elements.
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


@triton.jit
def sequence_of(cu, sequences, block, BLOCK: tl.constexpr):
    """The sequence of this block, where sequence s has the blocks from cu[s] // BLOCK + s on.

    These ranges are wide enough for any lengths, so total // BLOCK + sequences programs suffice;
    those behind the end of their sequence have nothing to do.
    """
    low = tl.full([], 0, tl.int32)
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu + middle) // BLOCK + middle <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = tl.load(cu + low)
    return low, (block - begin // BLOCK - low).to(tl.int32) * BLOCK


@triton.jit
def bounds_of(cu, sequence):
    begin = tl.load(cu + sequence).to(tl.int64)
    return begin, (tl.load(cu + sequence + 1) - begin).to(tl.int32)


@triton.jit
def load_rows(pointer, stride, rows, columns, length, HEAD_DIM: tl.constexpr, MASK: tl.constexpr):
    """Rows of a matrix, 0 beyond its length and its width; `columns` is a power of two long."""
    place = pointer + rows[:, None] * stride + columns[None, :]
    if HEAD_DIM < columns.shape[0]:
        inside = (columns < HEAD_DIM)[None, :]
        if MASK:
            inside = inside & (rows < length)[:, None]
        return tl.load(place, mask=inside, other=0.0)
    if MASK:
        return tl.load(place, mask=(rows < length)[:, None], other=0.0)
    return tl.load(place)


@triton.jit
def tanh(x):
    """tanh to the last digits also near 0, where (1 - e) / (1 + e) loses them (Cephes' tanhf)."""
    square = x * x
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * square * near, tl.where(x < 0, -far, far))
