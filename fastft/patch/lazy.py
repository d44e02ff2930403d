"""LazyLogits: logits that are computed when first read.

A loss that never needs the logits should not pay for them, and a user who reads `outputs.logits`
should find them. The tensor knows its shape, dtype and device; any operation on it computes it,
once, in the grad mode and under the autocast of the forward that made it. Two things it cannot
give, and raises: logits first read when an optimizer has moved the head's weights, and the gradient
of a loss that was computed without them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastft.patch.unchanged import Unchanged

_Tensor: Any = Tensor  # whose annotations tell an attribute's type, not that it is a descriptor
_METADATA = {
    _Tensor.shape.__get__,
    _Tensor.dtype.__get__,
    _Tensor.device.__get__,
    _Tensor.ndim.__get__,
    _Tensor.layout.__get__,
    _Tensor.is_sparse.__get__,
    _Tensor.is_cuda.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_floating_point,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    Tensor.is_complex,
    Tensor.__len__,
    Tensor.__hash__,
    Tensor.element_size,
}
# Where nothing is computed yet, there is none.
_HISTORY = {_Tensor.grad_fn.__get__, _Tensor._base.__get__}
_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


class LazyLogits(Tensor):
    """compute() gives the logits, with their autograd history; it runs at the first read.

    reads: what compute reads. RuntimeError at the first read if any of it has changed by then, as
    far as versions and samples of the values tell (`Unchanged`).
    """

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype,
        device: torch.device, requires_grad: bool, reads: Iterable[Tensor] = (),
    ) -> "LazyLogits":  # fmt: skip
        # The wrapper itself requires no gradient: code of PyTorch's that looks past our answer
        # below would take it for a leaf and lose the gradient silently.
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(
        self,
        compute: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
        reads: Sequence[Tensor] = (),
    ) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._unchanged: Unchanged | None = Unchanged(reads)
        self._logits: Tensor | None = None
        self._needs_grad = requires_grad
        self._hooks: OrderedDict[int, Callable[..., Any]] = OrderedDict()
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kind = device.type if isinstance(device, torch.device) else device
        self._autocast = (
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )  # fmt: skip

    def materialize(self) -> Tensor:
        """The logits as an ordinary tensor."""
        if self._compute is not None and self._unchanged is not None:
            if not self._unchanged():
                raise RuntimeError(
                    "outputs.logits: what they are computed from has changed since the forward; "
                    "read them before optimizer.step(), or whatever else has moved the weights"
                )
            (inference, grad), (kind, dtype, enabled) = self._modes, self._autocast
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad),
                torch.autocast(kind, dtype, enabled),
            ):
                self._logits, self._compute = self._compute(), None
                self._unchanged = None
                if self._hooks:
                    self._logits.register_hook(self._run_hooks)
        assert self._logits is not None
        return self._logits

    def _run_hooks(self, grad: Tensor) -> Tensor:
        for hook in tuple(self._hooks.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    def _hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    @property
    def is_materialized(self) -> bool:
        return self._logits is not None

    def _then(self, function: Callable[..., Any], dtype: torch.dtype) -> "LazyLogits":
        return LazyLogits(
            lambda: function(self.materialize()), self.shape, dtype, self.device,
            self._needs_grad,
        )  # fmt: skip

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.materialize())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.materialize().detach().clone()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _Tensor.requires_grad.__get__:
            return args[0]._needs_grad
        if args and isinstance(args[0], cls) and args[0]._needs_grad:
            if func is Tensor.retain_grad or (
                func is Tensor.register_hook and not _is_plumbing(*args[1:], **kwargs)
            ):
                raise RuntimeError(
                    f"outputs.logits.{func.__name__}: outputs.loss does not pass through them "
                    "and its part would be missing. For a loss of your own use a tensor made from "
                    "them, such as outputs.logits + 0, or call the model without labels"
                )
        if args and isinstance(args[0], cls) and not args[0].is_materialized:
            # accelerate casts every output of a mixed-precision step to float32, DDP clones them,
            # and FSDP casts them and hangs a hook on each: none of them reads a value.
            dtype = _cast(func, args, kwargs)
            if dtype is not None:
                same = dtype is args[0].dtype
                return args[0] if same else args[0]._then(lambda z: z.to(dtype), dtype)
            if func is Tensor.clone and len(args) == 1 and not kwargs:
                return args[0]._then(Tensor.clone, args[0].dtype)
            if func is Tensor.register_hook and args[0]._needs_grad:
                return args[0]._hook(*args[1:], **kwargs)
            if func in _HISTORY:
                return None
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda lazy: lazy.materialize(), (args, kwargs)
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda lazy: lazy.materialize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _is_plumbing(hook: Callable[..., Any]) -> bool:
    """FSDP's, which hangs it on every output to learn when backward begins."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed.")


def _cast(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.dtype | None:
    """The dtype that a call casts to, if it does nothing else."""
    if len(args) + len(kwargs) == 1:
        return _CASTS.get(func)
    if func is Tensor.to and len(args) + len(kwargs) == 2:
        target = args[1] if len(args) == 2 else kwargs.get("dtype")
        return target if isinstance(target, torch.dtype) else None
    return None
