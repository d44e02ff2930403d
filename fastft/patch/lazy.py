"""LazyLogits: logits that are computed when first read.

A loss that never needs the logits should not pay for them, and a user who reads `outputs.logits`
should find them. The tensor knows its shape, dtype and device; any operation on it computes it,
once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_METADATA = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.layout.__get__,
    Tensor.is_sparse.__get__,
    Tensor.is_cuda.__get__,
    Tensor.requires_grad.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.element_size,
}


class LazyLogits(Tensor):
    """compute() gives the logits, with their autograd history; it runs at the first read."""

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape, dtype, device, requires_grad):
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )

    def __init__(self, compute, shape, dtype, device, requires_grad):
        self._compute = compute
        self._logits = None

    def materialize(self) -> Tensor:
        """The logits as an ordinary tensor."""
        if self._logits is None:
            self._logits, self._compute = self._compute(), None
        return self._logits

    @property
    def is_materialized(self) -> bool:
        return self._logits is not None

    def _as(self, dtype: torch.dtype) -> "LazyLogits":
        return LazyLogits(
            lambda: self.materialize().to(dtype), self.shape, dtype, self.device,
            self.requires_grad,
        )  # fmt: skip

    def __repr__(self, **kwargs) -> str:
        return repr(self.materialize())

    def __reduce_ex__(self, protocol):
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.materialize().detach().clone()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        # accelerate turns every output of a mixed-precision step into float32.
        if func is Tensor.float and not args[0].is_materialized:
            return args[0]._as(torch.float32)
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda lazy: lazy.materialize(), (args, kwargs)
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda lazy: lazy.materialize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)
