"""Frozen linear layers of a model hold int8 or fp8 numbers instead of their weights (base_weights).

Which layers: `nn.Linear` itself, or the base of a PEFT LoRA layer, whose weight takes no gradient
and is nobody else's; the head and the embeddings stay. A layer is replaced by a `QuantizedLinear`
in its parent, on this instance; `restore` puts the layer itself back, with the weight that the
numbers stand for, or with the original where a folder keeps it. fp8 is for devices that multiply
it: elsewhere it is refused, rather than computed by the reference without a word.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fastft.ops import fp8_linear
from fastft.ops.quantized_layer import KINDS, Origin, QuantizedLinear, quantized_layers
from fastft.patch.swap import has_own_forward, is_hooked

FILE = "base_weights.safetensors"


def check_kind(kind: str, devices: Iterable[torch.device]) -> None:
    """Raises: ValueError for an unknown kind, or one that a device has no products of."""
    if kind not in KINDS:
        raise ValueError(f"base_weights: expected 'int8' or 'fp8', got {kind!r}")
    for device in devices:
        lacking = fp8_linear.why_not(device) if kind == "fp8" else None
        if lacking is not None:
            raise ValueError(
                "base_weights: 'fp8' needs a CUDA device of compute capability 8.9 or later "
                f"(Ada, Hopper, Blackwell), but {lacking}; 'int8' runs everywhere"
            )


def replaceable(
    model: nn.Module, on_meta: bool = False
) -> dict[str, tuple[nn.Module, str, nn.Linear]]:
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
            if type(layer) is not nn.Linear or layer in kept or layer.weight.is_meta != on_meta:
                continue
            if layer.weight.requires_grad or owners[id(layer.weight)] > 1:
                continue
            if is_hooked(layer) or has_own_forward(layer) or layer.weight.numel() == 0:
                continue
            found[f"{path}.{name}".lstrip(".")] = (parent, name, layer)
    return found


def why_none(model: nn.Module) -> str:
    """Why a model has no layer that can be replaced."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        # GPT-2's, whose weight is the other way round.
        if type(module).__name__ == "Conv1D" and isinstance(weight, nn.Parameter):
            if not weight.requires_grad:
                return "its frozen layers are Conv1D, and eight bits serve nn.Linear alone"
    return "no linear layer is frozen"


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
    found = {name: places[f"{plain}.weight"] for name, plain in names.items()
             if f"{plain}.weight" in places}  # fmt: skip
    if len(found) == len(names):
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


def store(model: nn.Module, kind: str, originals: str | Path | None) -> list[QuantizedLinear]:
    """Replaces the layers; those that are replaced already stay. The new ones, to be released.

    Raises: ValueError for a kind that is none or is not for this device, for another than the model
        holds, a folder of other weights, or a file.
    """
    if originals is not None and Path(originals).is_file():
        raise ValueError(f"originals: expected a folder, got the file {originals}")
    layers = replaceable(model)
    held = quantized_layers(model)
    lying = [layer.weight for _, _, layer in layers.values()] + [layer.values for layer in held]
    check_kind(kind, {each.device for each in lying or list(model.parameters())})
    if held and held[0].kind != kind:
        raise ValueError(
            f"base_weights: expected {held[0].kind!r}, which the model's base holds "
            f"already, got {kind!r}; fastft.unpatch(model) takes it out"
        )
    origins = {} if originals is None or not layers else _keep(layers, Path(originals))
    made = []
    for name, (parent, own, layer) in layers.items():
        made.append(QuantizedLinear(layer, kind, origins.get(name)))
        made[-1].train(layer.training)
        setattr(parent, own, made[-1])
    return made


def restore(model: nn.Module) -> list[str]:
    """Puts the layers back; what their weights are now, for the report."""
    counts = {"as they were": 0, "as eight bits gave them: no folder kept the originals": 0}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, QuantizedLinear):
                continue
            weight = layer.replaced.weight
            gone = weight.is_meta or not weight.numel()
            rounded = layer.origin is None and gone
            setattr(parent, name, layer.restored())
            counts[list(counts)[rounded]] += 1
    return [f"weights of {n} layers {how}" for how, n in counts.items() if n]
