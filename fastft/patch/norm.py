"""Swaps norms: RMSNorm of either kind and LayerNorm, recognised by what they compute."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule, eps_of
from fastft.ops.norm import layer_norm, rms_norm
from fastft.patch.confirm import Unlike, confirm, stand_in
from fastft.patch.swap import original_forward


@dataclass(frozen=True)
class Norm:
    """Which norm a module is."""

    raw: str  # dispatcher name
    eps: float
    offset: float = 0.0
    # The class gives the wider dtype of input and weight; the operator keeps the input's.
    promotes: bool = False


def _compute(options: Norm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if options.raw == "layer_norm":
        return layer_norm(x, weight, bias, options.eps)
    return rms_norm(x, weight, options.eps, offset=options.offset)


def forward(module: ForeignModule, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) != 1 or kwargs:  # a gate for instance, as Mamba's norms take: not confirmed
        out: Tensor = original_forward(module)(*args, **kwargs)
        return out
    return _forward(module, args[0])


def _forward(module: ForeignModule, x: Tensor) -> Tensor:
    options = module._fastft_swap.options
    weight = module.weight
    if (options.promotes and x.dtype != weight.dtype) or (
        options.raw == "layer_norm" and torch.is_autocast_enabled(x.device.type)
    ):
        out: Tensor = original_forward(module)(x)
        return out
    return _compute(options, x, weight, getattr(module, "bias", None))


def is_candidate(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and set(module._parameters) <= {"weight", "bias"}
        and not module._modules
        and eps_of(module) is not None
        and not isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    )


def recognise(module: ForeignModule) -> Norm:
    """Which norm this is; Unlike if none."""
    eps = eps_of(module)
    if eps is None:
        raise Unlike("it has no epsilon")
    # LayerNorm fixes its size in an attribute, so the stand-in keeps the module's.
    size = module.weight.shape[0]
    has_bias = module._parameters.get("bias") is not None
    weight = nn.Parameter(torch.linspace(-0.5, 1.5, size))
    bias = nn.Parameter(torch.linspace(1, -1, size)) if has_bias else None
    names = {"weight": weight, "bias": bias} if "bias" in module._parameters else {"weight": weight}
    probe = stand_in(module, names, {})
    x = torch.linspace(-2, 3, 3 * size).sin().view(1, 3, size) * 2
    kinds = [Norm("layer_norm", eps)]
    if not has_bias:
        kinds = [Norm("rms_norm", eps), Norm("rms_norm", eps, offset=1.0), *kinds]
    for kind in kinds:

        def replacement(x: Tensor, kind: Any = kind) -> Any:
            return _compute(kind, x, weight, bias)

        try:
            confirm(lambda x: type(module).forward(probe, x), replacement, [x])
        except Unlike as unlike:
            reason = unlike
            continue
        promotes = (
            kind.raw != "rms_norm"
            or type(module).forward(probe, x.bfloat16()).dtype is not torch.bfloat16
        )
        return replace(kind, promotes=promotes)
    raise reason
