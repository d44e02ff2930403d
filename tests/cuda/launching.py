"""Launch structures by ctypes: DTypes, pointers of tensors, calls that raise what CUDA says."""

import ctypes
import mmap

import torch
from torch import Tensor

# csrc/dtype.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pointer(tensor: Tensor | None) -> int | None:
    """The address of the first element; None for no tensor. The caller keeps the tensor alive."""
    return None if tensor is None else tensor.data_ptr()


def call(function, argument: ctypes.Structure) -> None:
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    failed = function(ctypes.addressof(argument), None)
    if failed is not None:
        raise RuntimeError(failed.decode())


def far(x: Tensor) -> Tensor:
    """The same values, steps along the first axis so long that the last lies beyond 2^31 elements.

    Pages that nobody touches cost nothing; malloc's would, since the sanitizer marks them all.
    """
    distance = (1 << 31) // (x.shape[0] - 1) + 8
    room = mmap.mmap(-1, ((x.shape[0] - 1) * distance + x[0].numel()) * x.element_size())
    flat = torch.frombuffer(room, dtype=x.dtype)
    return flat.as_strided(x.shape, (distance, *x[0].contiguous().stride())).copy_(x)
