"""load: a model whose frozen linear layers are rounded to eight bits as they are read, one by one.

A model that would not fit into memory in its own type is loaded so: what it takes at most is the
numbers of eight bits, the embeddings, and one weight.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastft.ops.quantized_layer import Origin, QuantizedLinear
from fastft.patch.base_weights import check_kind, replaceable


def load(
    folder: str | Path,
    kind: Any = None,
    *,
    base_weights: str = "int8",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
) -> nn.Module:
    """The model of a checkpoint of safetensors, frozen, its linear layers in eight bits.

    It lies on the CPU. Adapters of PEFT go onto it as onto any other, and `fastft.patch` swaps the
    rest. The checkpoint keeps the original weights: `unpatch` and `verify` read them there.

    Args:
        folder: a local folder, as `save_pretrained` writes it.
        kind: the class, one of transformers' Auto classes for instance; default
            AutoModelForCausalLM. Every weight it has must be in the checkpoint, by its own name.
        base_weights: "int8" or "fp8"; see `fastft.patch`. The head and the embeddings stay in
            `dtype`. fp8 needs a CUDA device that multiplies it, to which the model is moved then.
        config: the model's configuration; default: the folder's.
    No code of the folder runs. Raises: ValueError for another base_weights, or where this machine
        has no device for it, for a model that needs code of its own, or weights that are missing or
        of other shapes; FileNotFoundError for no folder, or one without safetensors.
    """
    import transformers
    from accelerate import init_empty_weights

    check_kind(base_weights, [torch.device("cuda")])
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: no folder {folder} here; hub names are not looked up")
    kind = kind or transformers.AutoModelForCausalLM
    # False, as without a word transformers asks at the terminal whether to run a folder's code.
    config = config or transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    places = dict(_places(folder))
    with init_empty_weights():  # the parameters alone: buffers are computed, not read
        if hasattr(kind, "from_config"):
            model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            model = kind._from_config(config, dtype=dtype)
    model.requires_grad_(False)
    model.tie_weights()
    layers = replaceable(model, on_meta=True)
    for name, (parent, own, layer) in layers.items():
        origin = places.get(f"{name}.weight")
        if origin is None:
            raise ValueError(f"folder: {folder} has no weight of {name}")
        weight = _read(origin, layer.weight, f"{name}.weight").to(dtype)
        setattr(parent, own, QuantizedLinear(layer, base_weights, origin, weight))
    missing = []
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if name not in places:
            missing.append(name)
            continue
        owner, _, own = name.rpartition(".")
        read = _read(places[name], parameter, name).to(dtype).clone()
        setattr(model.get_submodule(owner), own, nn.Parameter(read, requires_grad=False))
    model.tie_weights()
    lacking = [name for name in missing if model.get_parameter(name).is_meta]
    if lacking:
        raise ValueError(f"folder: {folder} has no weight of {', '.join(lacking[:4])}")
    model.name_or_path = config._name_or_path = str(folder)
    loaded: nn.Module = model.eval()
    return loaded


def _places(folder: Path) -> Iterator[tuple[str, Origin]]:
    """Where each tensor lies: by the index where there is one, else by the files themselves."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else None
    files = sorted(folder.glob("*.safetensors")) if names is None else map(folder.joinpath, names)
    found = False
    for file in dict.fromkeys(files):
        if file.parent != folder:
            raise ValueError(f"{index}: {file} lies outside of the folder")
        found = True
        with safe_open(file, "pt") as held:
            for key in held.keys():
                yield key, Origin(file, key)
    if not found:
        raise FileNotFoundError(f"folder: {folder} holds no safetensors")


def _read(origin: Origin, parameter: Tensor, name: str) -> Tensor:
    # Opened for each tensor: what has been read of a file counts as memory until it is closed.
    read = origin.read()
    if read.shape != parameter.shape:
        shapes = f"expected {tuple(parameter.shape)}, got {tuple(read.shape)}"
        raise ValueError(f"folder: {name} in {origin.file.name}: {shapes}")
    return read
