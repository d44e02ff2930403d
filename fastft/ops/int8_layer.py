"""Int8Linear: a linear layer that holds int8 numbers instead of a weight (base_weights="int8")."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from fastft.ops.int8_linear import int8_linear
from fastft.ops.quantized_linear import QuantizedWeight, dequantize, quantize


@dataclass(frozen=True)
class Origin:
    """Where the original weight lies: a safetensors file and the name in it."""

    file: Path
    name: str

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as held:
            return held.get_tensor(self.name)


class Int8Linear(nn.Module):
    """x W^T + bias over frozen int8 numbers, forward and backward (fastft/ops/int8_linear.py).

    Its state_dict has `weight` and `bias` as the layer's it stands for, the weight as the numbers
    give it, so a saved model is an ordinary one.
    """

    def __init__(self, layer: nn.Linear, origin: Origin | None = None):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        stored = quantize(layer.weight)
        self.register_buffer("values", stored.values, persistent=False)  # (out, in) int8
        self.register_buffer("scale", stored.scale, persistent=False)  # (out, 1) float32
        self.bias = layer.bias
        self.dtype = layer.weight.dtype
        self.computes = "int8"
        # Past nn.Module's own bookkeeping: it is no part of this one.
        vars(self)["replaced"], vars(self)["origin"] = layer, origin

    def release(self) -> None:
        """Frees the replaced layer's weight."""
        self.replaced.weight.data = self.replaced.weight.data.new_empty(0)

    @property
    def stored(self) -> QuantizedWeight:
        return QuantizedWeight(self.values, self.scale)

    @property
    def operand(self) -> QuantizedWeight | Tensor:
        """What x is multiplied by: the numbers, or a weight while `computing` asks for one."""
        if self.computes == "int8":
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
        return int8_linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __getattr__(self, name: str):
        if name == "weight":
            raise AttributeError(
                "this layer holds int8 numbers and no weight: fastft.unpatch(model) gives it back, "
                "for merging an adapter into it for instance"
            )
        return super().__getattr__(name)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        # model.half() would round the scales; they move with the values all the same.
        self.scale = scale.to(self.values.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = dequantize(self.stored, self.dtype)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        weight = state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if weight is None:
            missing.append(prefix + "weight")
            return
        stored = quantize(weight)
        self.values.copy_(stored.values)
        self.scale.copy_(stored.scale)
        vars(self)["origin"] = None  # what the folder keeps is another weight


def int8_layers(model: nn.Module) -> list[Int8Linear]:
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


@contextmanager
def computing(model: nn.Module, how: Literal["int8", "numbers", "original"]) -> Iterator[None]:
    """Inside, the model's int8 layers multiply by integers; or, in floating point, by the weights
    that their numbers stand for, or by the original ones where a folder keeps them.

    By "numbers" two ways to compute a model can be compared: rounding inputs to eight bits makes
    a large difference of a small one, wherever it falls the other way.
    """
    layers = int8_layers(model)
    before = [layer.computes for layer in layers]
    try:
        for layer in layers:
            layer.computes = how
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.computes = was
