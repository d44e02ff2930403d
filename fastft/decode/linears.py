"""Reads a linear layer of a model, with its adapters, as the fused decode step takes it.

Plain layers, GPT-2's Conv1D, layers of an int8 base, and PEFT's LoRA layers over one of them. What
computes more than its class does is refused, for its weights do not tell.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fastft.foreign import ForeignModule, is_conv1d, is_lora
from fastft.ops.decoder_layer import Linear
from fastft.ops.quantized_layer import QuantizedLinear
from fastft.ops.quantized_linear import FLOATS, MAX_RANK, Adapter, QuantizedWeight

# The attribute in which a layer has its copy for decoding: a DecodeWeight of fastft.decode.weights.
DECODE_WEIGHT = "_fastft_decode_weight"


class Unfit(Exception):
    """The fused step does not cover this model; the message says why."""


@dataclass(frozen=True)
class Reading:
    """names: the adapters rows choose from, None for the active one; stored: use DECODE_WEIGHTs."""

    names: tuple[str, ...] | None = None
    stored: bool = True


def check_plain(module: nn.Module, what: str) -> None:
    """Refuses a module that computes more than its class does, which its weights do not tell."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unfit(f"hooks on {what}")
    function = getattr(vars(module).get("forward"), "__func__", None)
    # What fastft.patch puts there computes the same.
    if "forward" in vars(module) and not getattr(function, "is_fastft", False):
        raise Unfit(f"{what} has a forward of its own")


def plain_weight(tensor: Tensor, what: str) -> Tensor:
    data = tensor.detach()
    if type(data) is not Tensor or data.is_meta:
        raise Unfit(f"{what} is a {type(data).__name__}")
    if data.dtype not in FLOATS:
        raise Unfit(f"{what} is of {data.dtype}")
    return data


def _stored(
    module: ForeignModule, what: str, stored: bool
) -> tuple[QuantizedWeight, Tensor | None]:
    """Weight (out, in) and bias of a plain linear layer or of GPT-2's Conv1D."""
    transposed = is_conv1d(module)
    held = vars(module).get(DECODE_WEIGHT) if stored else None
    if isinstance(module, QuantizedLinear):
        if module.kind != "int8":
            raise Unfit(f"{what} holds {module.kind} numbers, which the step does not read")
        # Its own numbers, whatever was asked to be stored: only whether inputs are rounded.
        rounds = stored and (held is None or held.stored.round_inputs)
        own = None if module.bias is None else plain_weight(module.bias, what)
        return replace(module.stored, round_inputs=rounds), own
    if type(module) is not nn.Linear and not transposed:
        raise Unfit(f"{what} is a {type(module).__name__}")
    weight = plain_weight(module.weight, what)
    weight = weight.t() if transposed else weight
    bias = None if module.bias is None else plain_weight(module.bias, what)
    return QuantizedWeight(weight) if held is None else held.current(weight), bias


def is_stored(module: nn.Module) -> bool:
    """Whether it has numbers of eight bits or less for decoding."""
    return DECODE_WEIGHT in vars(module) or isinstance(module, QuantizedLinear)


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a linear layer or Conv1D that the step reads; None if it is none."""
    if isinstance(module, QuantizedLinear):
        return None
    try:
        return _stored(module, "", stored=False)[0].values
    except Unfit:
        return None


def read_linear(module: nn.Module, what: str, how: Reading) -> Linear:
    """A linear layer with the adapters that are asked for."""
    names = how.names
    check_plain(module, what)
    if not is_lora(module):
        held, bias = _stored(module, what, how.stored)
        return Linear(held, bias, (None,) * (1 if names is None else len(names)))
    base = module.get_base_layer()
    check_plain(base, what)
    held, bias = _stored(base, what, how.stored)
    if names is not None:
        if module.merged:
            raise Unfit("adapter_names with merged adapters")
        return Linear(held, bias, tuple(_adapter(module, name, what) for name in names))
    if module.disable_adapters and module.merged:
        raise Unfit("disabled adapters that are still merged")
    if module.disable_adapters or module.merged:
        return Linear(held, bias, (None,))
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) > 1:
        raise Unfit("several active adapters")
    return Linear(held, bias, (_adapter(module, active[0], what) if active else None,))


def _adapter(module: ForeignModule, name: str, what: str) -> Adapter | None:
    if name not in module.lora_A:
        return None
    if name in module.lora_variant:
        raise Unfit(f"a LoRA variant such as DoRA on {what}")
    low, high = module.lora_A[name], module.lora_B[name]
    for part in (low, high, module.lora_dropout[name]):
        check_plain(part, what)
    if type(low) is not nn.Linear or type(high) is not nn.Linear or high.bias is not None:
        raise Unfit(f"adapter factors of {what} that are no plain nn.Linear")
    if low.weight.shape[0] > MAX_RANK:
        raise Unfit(f"rank {low.weight.shape[0]} of {what} is above {MAX_RANK}")
    a, b = plain_weight(low.weight, what), plain_weight(high.weight, what)
    return Adapter(a, b, float(module.scaling[name]))
