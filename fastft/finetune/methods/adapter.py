"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), a small module after a projection.

With y (..., hidden) what the projection gives, that is before dropout and residual:

    adapted = y + W_up gelu(W_down y + b_down) + b_up       W_down (bottleneck, hidden)

W_up and b_up start at zero, so training starts from the pretrained model. The module is a child of
the projection's own instance and runs in its forward hook: parameters keep their names, no class
changes. It is not linear, so it cannot be merged into the projection's weight.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastft.finetune import UserError, need
from fastft.finetune.methods import layers
from fastft.foreign import ForeignModule

KIND = "FASTFT_BOTTLENECK"  # peft_type in adapter_config.json
_CHILD = "bottleneck_adapter"


class Bottleneck(nn.Module):
    def __init__(self, hidden: Any, bottleneck: int, device: torch.device | None = None) -> None:
        super().__init__()
        # float32 over half-precision models too: what is trained is kept exactly, as PEFT does.
        where: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.down = nn.Linear(hidden, bottleneck, **where)
        self.up = nn.Linear(bottleneck, hidden, **where)
        nn.init.normal_(self.down.weight, std=0.01)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.down(y.to(self.down.weight.dtype)))
        out: Tensor = y + self.up(hidden).to(y.dtype)
        return out


def _hook(projection: nn.Module, args: Any, output: Tensor) -> Tensor:
    out: Tensor = getattr(projection, _CHILD)(output)
    return out


def is_added(model: nn.Module) -> bool:
    return "_fastft_adapter" in vars(model)


def add(model: ForeignModule, names: list[str], bottleneck: int, heads: list[str]) -> ForeignModule:
    """A new adapter after each named linear layer; these and the heads are trained, no more.

    heads: names of modules that are trained whole and saved beside the adapters.
    """
    if is_added(model):
        raise UserError("this model has bottleneck adapters already")
    model.requires_grad_(False)
    for name in names:
        projection = model.get_submodule(name)
        new = Bottleneck(layers.width_of(projection), bottleneck, projection.weight.device)
        projection.add_module(_CHILD, new.train(model.training))
        projection.register_forward_hook(_hook)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    model._fastft_adapter = {
        "bottleneck": bottleneck,
        "target_modules": list(names),
        "modules_to_save": list(heads),
    }
    return model


def save(model: ForeignModule, folder: str | Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT calls its own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = getattr(model.config, "_name_or_path", "")
    settings = {"peft_type": KIND, "base_model_name_or_path": base, **model._fastft_adapter}
    state = model.state_dict()
    held = {name: state[name].detach().contiguous() for name in _shapes(model, settings)}
    safetensors = need("safetensors.torch", "saving an adapter")
    safetensors.save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(
    model: nn.Module, folder: str | Path, settings: dict[str, Any], *, trainable: bool = False
) -> nn.Module:
    """The model with the adapters of a folder, in place; settings: its adapter_config.json.

    Raises: UserError, the model unchanged, where they do not fit it.
    """
    safetensors = need("safetensors", "loading an adapter")
    path = Path(folder) / "adapter_model.safetensors"
    try:
        expected = _shapes(model, settings)
        with safetensors.safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}
    except AttributeError as error:
        raise UserError(f"{folder}: not an adapter of this model: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/adapter_config.json: {error} is missing or wrong") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"{folder}: not an adapter of this model: {name} has shape {shapes.get(name)}, "
                f"expected {expected.get(name)}"
            )
    add(model, *(settings[key] for key in ("target_modules", "bottleneck", "modules_to_save")))
    model.load_state_dict(held, strict=False)
    if not trainable:
        model.requires_grad_(False)
    return model


def _shapes(model: nn.Module, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is saved: the adapters and the heads, by their names in the model.

    Raises: AttributeError for a name that the model does not have.
    """
    bottleneck = settings["bottleneck"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in settings["target_modules"]:
        hidden: Any = layers.width_of(model.get_submodule(name))
        shapes[f"{name}.{_CHILD}.down.weight"] = (bottleneck, hidden)
        shapes[f"{name}.{_CHILD}.down.bias"] = (bottleneck,)
        shapes[f"{name}.{_CHILD}.up.weight"] = (hidden, bottleneck)
        shapes[f"{name}.{_CHILD}.up.bias"] = (hidden,)
    for head in settings["modules_to_save"]:
        for name, value in model.get_submodule(head).state_dict().items():
            shapes[f"{head}.{name}"] = tuple(value.shape)
    return shapes
