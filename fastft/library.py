"""The one file that defines operators, and loads the compiled ones.

Every operator is two entries of PyTorch's dispatcher, forward and backward, in the namespace
`torch.ops.fastft`. Its reference, plain PyTorch, is registered for every device and for tracing;
compiled kernels take a device's key when they load, so the dispatcher alone chooses.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

P = ParamSpec("P")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
Function = TypeVar("Function", bound=Callable[..., Any])


class Operator(Protocol[P, Result_co]):
    """What `operator` makes of a reference, called as the reference is."""

    op: "torch._ops.OpOverload[..., Any]"
    reference: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result_co: ...


_library = torch.library.Library("fastft", "DEF")
_references: dict[str, Callable[..., Any]] = {}
_kinds: dict[tuple[str, str], str] = {}

try:
    # Not `from fastft import _C`: that form tells a missing module by another exception.
    import fastft._C as _built
except ModuleNotFoundError as missing:
    # Not built is allowed and shown by `fastft doctor`; built but broken raises.
    if missing.name != "fastft._C":
        raise
    extension: ModuleType | None = None
else:
    extension = _built


def _without_autocast(op: Callable[..., Any], key: torch._C.DispatchKey) -> Callable[..., Any]:
    """The raw operators compute in the dtypes they are given: public functions apply autocast."""

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*args)

    return call


def operator(schema: str) -> Callable[[Callable[P, Result]], Operator[P, Result]]:
    """Defines `torch.ops.fastft.<name>` from a schema; the decorated function is its reference.

    The reference must return the shapes, strides and dtypes the kernels return and never read a
    value on the host. Gives back the operator, which runs the reference itself in float64, a type
    that no kernel takes.
    """

    def register(reference: Callable[P, Result]) -> Operator[P, Result]:
        name = schema.split("(", 1)[0]
        _library.define(schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        op = getattr(torch.ops.fastft, name).default
        for key in ("AutocastCPU", "AutocastCUDA"):
            _library.impl(name, _without_autocast(op, getattr(torch._C.DispatchKey, key)), key)
        _references[name] = reference

        def call(*args: Any) -> Any:
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            serving: Callable[..., Any] = reference if first.dtype is torch.float64 else op
            return serving(*args)

        call.op, call.reference = op, reference  # type: ignore[attr-defined]
        return cast(Operator[P, Result], call)

    return register


def kernel_only(schema: str) -> Callable[..., Any]:
    """Defines `torch.ops.fastft.<name>` without a reference: where no kernel serves it, it raises.

    For what only prepares or joins calls of operators that have one.
    """
    _library.define(schema)
    op: Callable[..., Any] = getattr(torch.ops.fastft, schema.split("(", 1)[0]).default
    return op


def implement(op: Operator[..., Any], device: str, kind: str) -> Callable[[Function], Function]:
    """Makes the decorated Python function serve `op` on a device ("CPU", "CUDA").

    For operators that are a composition of a library's products and compiled passes of our own;
    `kind` is what `operators` tells of it. Without fastft._C the CPU keeps the reference, without
    triton CUDA does.
    """
    passes = extension is not None if device == "CPU" else find_spec("triton") is not None

    def register(function: Function) -> Function:
        if passes:
            name = op.op._schema.name.removeprefix("fastft::")
            _library.impl(name, function, device)
            _kinds[name, device.lower()] = kind
        return function

    return register


def implement_in_triton(file: str, *ops: Operator[..., Any]) -> None:
    """Points the CUDA key of operators at the launchers of their names in kernels/triton/<file>.py.

    The file is imported at the first call; without triton, CUDA keeps the reference.
    """
    if find_spec("triton") is None:
        return
    for op in ops:
        name = op.op._schema.name.removeprefix("fastft::")

        def launch(*args: Any, name: str = name) -> Any:
            return getattr(import_module(f"fastft.kernels.{file}"), name)(*args)

        _library.impl(name, launch, "CUDA")
        _kinds[name, "cuda"] = "Triton"


def operators() -> dict[str, dict[str, str]]:
    """Operator -> device -> what serves it there: "C++", "Triton", "PyTorch reference"…"""
    table = {}
    for name in sorted(_references):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        row = {}
        for device, key, kind in (("cpu", "CPU", "C++"), ("cuda", "CUDA", "CUDA C++")):
            found = has(f"fastft::{name}", key)
            row[device] = _kinds.get((name, device), kind) if found else "PyTorch reference"
        table[name] = row
    return table


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks of matrix products on this device, None where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its autograd Function rather than straight to the operator.

    The Function also refuses forward-mode derivatives and torch.func's transforms, which the
    operator alone would pass by without a word.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def first_derivatives_only(
    backward: Callable[Concatenate[Any, P], Result],
) -> Callable[Concatenate[Any, P], Result]:
    """Decorates the backward of an operator's autograd Function: RuntimeError under create_graph.

    Not `once_differentiable`, which lets the call pass where the upstream gradient is a constant,
    and gives gradients that do not know of the inputs: derivatives of them would lack terms.
    """
    name = backward.__module__.rpartition(".")[2]

    @wraps(backward)
    def call(ctx: Any, *upstream: P.args, **kwargs: P.kwargs) -> Result:
        # A compiled graph refuses by itself; while it is traced, grad mode says nothing.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{name}: backward was called with create_graph=True, but fastft computes first "
                "derivatives only: fastft.unpatch(model), or call PyTorch's own operators"
            )
        return backward(ctx, *upstream, **kwargs)

    return cast(Callable[Concatenate[Any, P], Result], call)


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, those that came before replaced by views: a trace takes no tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [
        t if t is None or all(t is not other for other in tensors[:i]) else t.view_as(t)
        for i, t in enumerate(tensors)
    ]


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, last dimension) with a contiguous last dimension; a view where that is possible.

    The kernels read rows at any distance from each other, so slices along the rows are not copied.
    """
    if x.dim() != 2:
        # Counted, because reshape cannot tell -1 of a tensor without elements.
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
