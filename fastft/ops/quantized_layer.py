"""QuantizedLinear: a linear layer that holds numbers of eight bits instead of a weight."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastft.ops.fp8_linear import fp8_linear, quantize_fp8
from fastft.ops.int8_linear import int8_linear
from fastft.ops.quantized_linear import QuantizedWeight, dequantize, quantize
from fastft.ops.round_rows import FP8

# How a kind of base_weights stores a weight, and multiplies by it.
KINDS = {"int8": (quantize, int8_linear), "fp8": (quantize_fp8, fp8_linear)}


@dataclass(frozen=True)
class Origin:
    """Where the original weight lies: a safetensors file and the name in it."""

    file: Path
    name: str

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as held:
            out: Tensor = held.get_tensor(self.name)
            return out


class _NoWeight(Tensor):
    """The weight of a layer that holds none."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        raise RuntimeError(
            "this layer holds numbers of eight bits and no weight: fastft.unpatch(model) gives it "
            "back, for merging an adapter into it for instance"
        )


class QuantizedLinear(nn.Linear):
    """x W^T + bias over frozen int8 or fp8 numbers, forward and backward: one of KINDS.

    A Linear by class, so that PEFT puts adapters on it. Its state_dict has `weight` and `bias` as
    the layer's it stands for, the weight as the numbers give it, so a saved model is an ordinary
    one.
    """

    values: Tensor
    scale: Tensor
    replaced: nn.Linear
    origin: Origin | None

    def __init__(
        self,
        layer: nn.Linear,
        kind: str,
        origin: Origin | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """weight: of a layer on the meta device."""
        nn.Module.__init__(self)  # not Linear's, which would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind = kind
        stored = self._quantized(layer.weight if weight is None else weight)
        # (out, in) int8, or the bytes of fp8: nobody takes those for numbers, to be cast by half().
        self.register_buffer("values", stored.values.view(torch.int8), persistent=False)
        self.register_buffer("scale", stored.scale, persistent=False)  # (out, 1) float32
        self.bias = layer.bias
        self.dtype: torch.dtype = layer.weight.dtype
        self.computes: Literal["stored", "numbers", "original"] = "stored"
        # Past nn.Module's own bookkeeping: it is no part of this one.
        vars(self)["replaced"], vars(self)["origin"] = layer, origin

    def release(self) -> None:
        """Frees the replaced layer's weight."""
        self.replaced.weight.data = self.replaced.weight.data.new_empty(0)

    def restored(self) -> nn.Linear:
        """The replaced layer, with its weight again if it was freed, or never there."""
        layer = self.replaced
        if layer.weight.is_meta:
            layer.weight = nn.Parameter(self.original(), requires_grad=False)
        elif not layer.weight.numel():
            layer.weight.data = self.original()
        layer.bias = self.bias
        layer.train(self.training)
        return layer

    @property
    def stored(self) -> QuantizedWeight:
        values = self.values.view(FP8) if self.kind == "fp8" else self.values
        return QuantizedWeight(values, self.scale)

    def _quantized(self, weight: Tensor) -> QuantizedWeight:
        return KINDS[self.kind][0](weight)

    @property
    def operand(self) -> QuantizedWeight | Tensor:
        """What x is multiplied by: the numbers, or a weight while `computing` asks for one."""
        if self.computes == "stored":
            return self.stored
        if self.computes == "numbers":
            return dequantize(self.stored, self.dtype)
        return self.original()

    def original(self) -> Tensor:
        """The weight (out, in): the one it had where a folder keeps it, else the numbers'."""
        if self.origin is None:
            return dequantize(self.stored, self.dtype)
        return self.origin.read().to(self.values.device, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.operand
        if isinstance(weight, Tensor):
            return nn.functional.linear(x, weight, self.bias)
        return KINDS[self.kind][1](x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What tells shape, dtype and device, as PEFT asks, and raises for whoever computes."""
        device = self.values.device
        shape = (self.out_features, self.in_features)
        return Tensor._make_wrapper_subclass(_NoWeight, shape, dtype=self.dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scale = self.scale
        super()._apply(fn, recurse)
        # model.half() would round the scales; they move with the values all the same.
        self.scale = scale.to(self.values.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = dequantize(self.stored, self.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        weight = state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if weight is None:
            missing.append(prefix + "weight")
            return
        stored = self._quantized(weight)
        self.values.copy_(stored.values.view(torch.int8))
        self.scale.copy_(stored.scale)  # type: ignore[arg-type]  # both kinds have one
        vars(self)["origin"] = None  # what the folder keeps is another weight


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def kind_of(model: nn.Module) -> str | None:
    """What the model's base is held in: one of KINDS, or None. No model has both."""
    return next((layer.kind for layer in quantized_layers(model)), None)


@contextmanager
def computing(model: nn.Module, how: Literal["stored", "numbers", "original"]) -> Iterator[None]:
    """Inside, the model's quantised layers multiply by what is stored; or, in its own type, by the
    weights that their numbers stand for, or by the original ones where a folder keeps them.

    By "numbers" two ways to compute a model can be compared: rounding inputs to eight bits makes
    a large difference of a small one, wherever it falls the other way.
    """
    layers = quantized_layers(model)
    before = [layer.computes for layer in layers]
    try:
        for layer in layers:
            layer.computes = how
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.computes = was
