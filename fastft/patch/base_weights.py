"""Frozen linear layers of a model hold int8 numbers instead of their weights (base_weights="int8").

Which layers: `nn.Linear` itself, or the base of a PEFT LoRA layer, whose weight takes no gradient
and is nobody else's; the head and the embeddings stay. A layer is replaced by an `Int8Linear` in
its parent, on this instance; `restore` puts the layer itself back, with the weight that the numbers
stand for, or with the original where a folder keeps it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastft.ops.int8_linear import int8_linear
from fastft.ops.quantized_linear import QuantizedWeight, dequantize, quantize
from fastft.patch.swap import has_own_forward, is_hooked

FILE = "base_weights.safetensors"


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
        # Past nn.Module's own bookkeeping: it is no part of this one.
        vars(self)["replaced"], vars(self)["origin"] = layer, origin

    def release(self) -> None:
        """Frees the replaced layer's weight."""
        self.replaced.weight.data = self.replaced.weight.data.new_empty(0)

    @property
    def stored(self) -> QuantizedWeight:
        return QuantizedWeight(self.values, self.scale)

    def original(self) -> Tensor:
        """The weight (out, in): the one it had where a folder keeps it, else the numbers'."""
        if self.origin is None:
            return dequantize(self.stored, self.dtype)
        return self.origin.read().to(self.values.device, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.stored, self.bias)

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


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Linear]]:
    """Name -> parent, the name in it, and layer, of those that can be replaced."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    kept = set()
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", None)
        kept.add(head() if head is not None else None)
        for name in ("lora_A", "lora_B"):
            if isinstance(getattr(module, name, None), nn.ModuleDict):
                kept.update(getattr(module, name).values())
    found = {}
    for path, parent in model.named_modules():
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear or layer in kept or layer.weight.is_meta:
                continue
            if layer.weight.requires_grad or owners[id(layer.weight)] > 1:
                continue
            if is_hooked(layer) or has_own_forward(layer) or layer.weight.numel() == 0:
                continue
            found[f"{path}.{name}".lstrip(".")] = (parent, name, layer)
    return found


def _keep(layers: dict[str, tuple[nn.Module, str, nn.Linear]], folder: Path) -> dict[str, Origin]:
    """The original weights' places in a folder: its checkpoint's, or those of a file made here."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = {name: name.replace("base_model.model.", "", 1).replace(".base_layer", "")
             for name in layers}  # fmt: skip
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            for key in held.keys():
                places[key] = Origin(file, key)
    found = {name: places.get(f"{plain}.weight") for name, plain in names.items()}
    if all(found.values()):
        for name, origin in found.items():
            weight = layers[name][2].weight
            if not torch.equal(origin.read().to(weight.device, weight.dtype), weight):
                raise ValueError(f"originals: {folder} holds another weight of {names[name]}")
        return found
    if places:
        raise ValueError(f"originals: {folder} holds other tensors than this model's weights")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    save_file({f"{names[n]}.weight": layer.weight.detach().contiguous()
               for n, (_, _, layer) in layers.items()}, file)  # fmt: skip
    return {name: Origin(file, f"{names[name]}.weight") for name in layers}


def store(model: nn.Module, kind: str, originals: str | Path | None) -> list[Int8Linear]:
    """Replaces the layers; those that are replaced already stay. The new ones, to be released.

    Raises: ValueError for another kind than "int8", or a folder of other weights.
    """
    if kind != "int8":
        raise ValueError(f"base_weights: expected 'int8' or None, got {kind!r}")
    layers = _layers(model)
    origins = {} if originals is None or not layers else _keep(layers, Path(originals))
    made = []
    for name, (parent, own, layer) in layers.items():
        made.append(Int8Linear(layer, origins.get(name)))
        made[-1].train(layer.training)
        setattr(parent, own, made[-1])
    return made


def restore(model: nn.Module) -> list[str]:
    """Puts the layers back; what their weights are now, for the report."""
    counts = {"as they were": 0, "as int8 gave them: no folder kept the originals": 0}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, Int8Linear):
                continue
            replaced = layer.replaced
            released = not replaced.weight.numel()
            if released:
                replaced.weight.data = layer.original()
            replaced.bias = layer.bias
            replaced.train(layer.training)
            setattr(parent, name, replaced)
            counts[list(counts)[released and layer.origin is None]] += 1
    return [f"weights of {n} layers {how}" for how, n in counts.items() if n]
