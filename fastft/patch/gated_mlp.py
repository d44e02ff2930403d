"""Swaps gated MLPs: gate/up/down, or gate and up in one projection (Phi-3)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule
from fastft.ops.gated_mlp import ACTIVATIONS, gated_mlp
from fastft.ops.lora_mlp import lora_mlp
from fastft.patch import lora as lora_layers
from fastft.patch.confirm import Unlike, confirm, stand_in
from fastft.patch.swap import is_hooked, original_forward

_SEPARATE = ("gate_proj", "up_proj", "down_proj")
_JOINT = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class GatedMlp:
    """Which gated MLP a module is."""

    activation: str
    joint: bool  # gate and up are the halves of one projection


def is_candidate(module: nn.Module) -> bool:
    names = set(module._modules)
    linear = all(
        c is not None and (isinstance(c, nn.Linear) or lora_layers.is_candidate(c))
        for n, c in module._modules.items()
        if n.endswith("_proj")
    )
    return linear and (names >= set(_SEPARATE) or names >= set(_JOINT)) and not module._parameters


def forward(module: ForeignModule, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) != 1 or kwargs:  # the number of a layer for instance: not confirmed
        out: Tensor = original_forward(module)(*args, **kwargs)
        return out
    return _forward(module, args[0])


def _forward(module: ForeignModule, x: Tensor) -> Tensor:
    options = module._fastft_swap.options
    # The products call their modules; the activation's would be left out.
    if any(is_hooked(c) for n, c in module._modules.items() if not n.endswith("_proj")):
        out: Tensor = original_forward(module)(x)
        return out
    if options.joint:
        return _joint(module, x, options.activation)
    linears: list[Any] = [lora_layers.child(module, name) for name in _SEPARATE]
    if all(each is not None and lora_layers.takes(x, each) for each in linears):
        gate, up, down = linears
        return lora_mlp(x, gate, up, down, options.activation)
    return _separate(module, x, options.activation)


def _separate(module: ForeignModule, x: Tensor, activation: str) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    out: Tensor = module.down_proj(gated_mlp(gate, up, activation))
    return out


def _joint(module: ForeignModule, x: Tensor, activation: str) -> Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    out: Tensor = module.down_proj(gated_mlp(gate, up, activation))
    return out


def recognise(module: nn.Module) -> GatedMlp:
    """Which gated MLP this is; Unlike if none."""
    hidden, intermediate = 6, 10
    joint = set(module._modules) >= set(_JOINT)
    sizes = {
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "gate_up_proj": (hidden, 2 * intermediate),
        "down_proj": (intermediate, hidden),
    }
    children = dict(module._modules)
    generator = torch.Generator().manual_seed(0)
    for name in _JOINT if joint else _SEPARATE:
        linear = nn.Linear(*sizes[name], device="meta").to_empty(device="cpu")
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator)
        children[name] = linear
    probe = stand_in(module, {}, children)
    x = torch.randn(1, 4, hidden, generator=generator)
    compute = _joint if joint else _separate
    for activation in ACTIVATIONS:

        def replacement(x: Tensor, activation: str = activation) -> Any:
            return compute(probe, x, activation)

        try:
            confirm(lambda x: type(module).forward(probe, x), replacement, [x])
        except Unlike as unlike:
            reason = unlike
            continue
        return GatedMlp(activation, joint)
    raise reason
