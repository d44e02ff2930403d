"""Swaps PEFT's LoRA layers, over nn.Linear, GPT-2's Conv1D, int8, fp8 and quantised bases.

PEFT's state decides at every call: merged, disabled, mixed or DoRA adapters take PEFT's own path.

Query, key and value keep a call each. `lora_shared` would take 1/1.1 to 1/1.2 of their time on the
CPU, 1 to 3% of the linears of a SmolLM2-135M layer (bench_lora.py), but attention modules call them
one by one: the first would have to compute ahead for the others, in trust that they get the same
input, and hold results that an error, checkpointing or another gradient mode may leave over.
On GPUs this has not been measured.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule, is_conv1d, is_lora
from fastft.ops.lora import LoraLinear, lora
from fastft.ops.lora_onto import lora_onto
from fastft.ops.quantized_layer import QuantizedLinear
from fastft.ops.quantized_linear import QuantizedWeight
from fastft.patch.swap import has_own_forward, is_hooked, original_forward


def is_candidate(module: nn.Module) -> bool:
    """A LoRA layer of PEFT's over some linear base."""
    if not is_lora(module):
        return False
    base = module.get_base_layer()
    return _is_plain_base(base) or _is_quantised(base)


def _is_plain_base(base: nn.Module) -> bool:
    return type(base) is nn.Linear or isinstance(base, QuantizedLinear) or is_conv1d(base)


def _is_quantised(base: nn.Module) -> bool:
    """bitsandbytes' 4-bit and 8-bit layers: their product stays theirs."""
    return isinstance(base, nn.Linear) and type(base).__module__.startswith("bitsandbytes.")


def why_not(module: ForeignModule) -> str | None:
    """Why this LoRA layer keeps PEFT's own path in its present state; None if it need not."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters:
        return "adapters disabled: PEFT's own path"
    if module.merged:
        return "adapter merged: PEFT's own path"
    if len(active) > 1:
        return "several active adapters: PEFT's own path"
    if active and active[0] in module.lora_variant:
        return "a LoRA variant such as DoRA: PEFT's own path"
    if active and module.lora_B[active[0]].bias is not None:
        return "lora_bias: PEFT's own path"
    base = module.get_base_layer()
    parts = [base]
    if active:
        parts += [module.lora_A[active[0]], module.lora_B[active[0]]]
        if not isinstance(module.lora_dropout[active[0]], nn.Dropout | nn.Identity):
            return f"dropout of type {type(module.lora_dropout[active[0]]).__name__}"
        if any(type(part) is not nn.Linear for part in parts[1:]):
            return "adapter factors that are not nn.Linear: PEFT's own path"
    if any(is_hooked(part) or has_own_forward(part) for part in parts):
        return "hooks on its parts: PEFT's own path"
    return None


def as_lora_linear(module: ForeignModule) -> LoraLinear | None:
    """A plain or LoRA linear layer as the operators take it; None if it must run by itself."""
    if type(module) is nn.Linear:
        return None if has_own_forward(module) else LoraLinear(module.weight, module.bias)
    if isinstance(module, QuantizedLinear):
        return None if has_own_forward(module) else LoraLinear(module.operand, module.bias)
    if is_conv1d(module):
        if has_own_forward(module):
            return None
        return LoraLinear(module.weight, module.bias, transposed=True)
    if not is_candidate(module) or why_not(module) is not None:
        return None
    base = module.get_base_layer()
    if not _is_plain_base(base):
        return None
    weight = base.operand if isinstance(base, QuantizedLinear) else base.weight
    return _with_adapter(module, weight, base.bias, is_conv1d(base))


def _with_adapter(
    module: ForeignModule, weight: Any, bias: Tensor | None, transposed: bool = False
) -> LoraLinear:
    name = next((name for name in module.active_adapters if name in module.lora_A), None)
    if name is None:
        return LoraLinear(weight, bias, transposed=transposed)
    dropout = module.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return LoraLinear(
        weight, bias, module.lora_A[name].weight, module.lora_B[name].weight,
        module.scaling[name], p, transposed,
    )  # fmt: skip


def takes(x: Tensor, linear: LoraLinear) -> bool:
    """The operator's dtypes: the base's own, or autocast's; eight bits go with any."""
    if isinstance(linear.weight, QuantizedWeight):
        return x.is_floating_point()
    return x.dtype == linear.weight.dtype or torch.is_autocast_enabled(x.device.type)


def forward(module: ForeignModule, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not args and not kwargs and why_not(module) is None:
        base = module.get_base_layer()
        if _is_quantised(base):
            return lora_onto(base(x), x, _with_adapter(module, None, None))
        linear = as_lora_linear(module)
        if linear is not None and takes(x, linear):
            return lora(x, linear)
    out: Tensor = original_forward(module)(x, *args, **kwargs)
    return out


def child(parent: nn.Module, name: str) -> LoraLinear | None:
    """A child that a fused unit may read directly: no hooks, no forward but ours or its class's."""
    module = getattr(parent, name)
    if is_hooked(module) or has_own_forward(module):
        return None
    return as_lora_linear(module)
