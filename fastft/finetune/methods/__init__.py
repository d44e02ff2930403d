"""What of a model is trained: methods.apply(model, config, task).

    full         all of it                 lora, dora  low-rank updates of linear layers (peft)
    top-layers   the last layers           qlora       lora over a base of 4 bits (bitsandbytes)
    bitfit       biases (2106.10199)       ia3         scales of keys, values and MLP (peft)
    adapter      bottlenecks (1902.00751)  prompt      virtual tokens before the text (peft)
                                           prefix      virtual keys and values (peft)

Every method trains a classifier's head beside its own parameters. `full`, `top-layers` and `bitfit`
give the model itself, saved whole; the others are saved as adapters: `save` and `load` here.
"""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastft.finetune import UserError, need
from fastft.finetune.methods import adapter, layers
from fastft.finetune.tasks import TASKS
from fastft.foreign import ForeignModule

METHODS = (
    "full", "top-layers", "bitfit", "lora", "dora", "adapter", "prompt", "prefix", "ia3", "qlora",
)  # fmt: skip
# Names what layers it goes to; the others have no such choice.
_TARGETED = ("lora", "dora", "qlora", "ia3", "adapter")


class Settings(Protocol):
    """What `apply` reads of a command's settings."""

    @property
    def method(self) -> str: ...

    rank: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | None  # None: the method's own choice
    top_layers: int
    virtual_tokens: int
    bottleneck: int


def fits(
    method: str, task: str, *, packing: bool = False, checkpointing: bool = False
) -> str | None:
    """Why this method does not go with this task, in one clause; None if it does.

    packing: several texts in one row, told apart by position_ids.
    checkpointing: gradient checkpointing.
    """
    if method == "prompt" and task == "ner":
        return "prompt tuning gives the virtual tokens logits too, which no tag belongs to"
    if method in ("prompt", "prefix") and packing:
        return "virtual tokens are put before a row, and packed rows hold several texts"
    if method == "prefix" and checkpointing:
        return "layers that are computed again would find the prefix in the cache a second time"
    if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "qlora needs bitsandbytes: pip install bitsandbytes"
    return None


def apply(model: nn.Module, config: Settings, task: str) -> nn.Module:
    """Leaves trainable what the method trains; returns the model, or PEFT's around it.

    Before fastft.patch, which sees what was added. Random weights are drawn from PyTorch's
    generator. Raises: UserError for a method that does not fit the task or this model.
    """
    if config.method not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, got {config.method!r}")
    if task not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    reason = fits(config.method, task)
    if reason is not None:
        raise UserError(f"method {config.method} does not fit task {task}: {reason}")
    if config.target_modules and config.method not in _TARGETED:
        raise UserError(f"target_modules: method {config.method} has no choice of modules")
    if config.method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if config.method == "top-layers":
        return _top_layers(model, config.top_layers, task)
    if config.method == "bitfit":
        return _bitfit(model, task)
    if config.method == "adapter":
        ends = config.target_modules or sum(layers.projections(model), [])
        heads = layers.head(model, task)
        added: nn.Module = adapter.add(model, layers.named(model, ends), config.bottleneck, heads)
        return added
    from fastft.finetune.methods import through_peft

    wrapped: nn.Module = through_peft.wrap(model, config, task)
    return wrapped


def _top_layers(model: nn.Module, count: int, task: str) -> nn.Module:
    """The last layers, the norm after them and the head; embeddings and output layer stay."""
    heads = layers.head(model, task)
    _, found = layers.layers(model)
    least = 0 if heads else 1  # a head can be trained alone
    if not least <= count <= len(found):
        raise UserError(f"top_layers: expected {least} to {len(found)} for this model, got {count}")
    parts = [model.get_submodule(name) for name in heads]
    if count:
        parts += [*found[-count:], *map(model.get_submodule, layers.last_norms(model))]
    for part in parts:
        part.requires_grad_(True)
    return model


def _bitfit(model: nn.Module, task: str) -> nn.Module:
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    heads = layers.head(model, task)
    inside = {p for name in heads for p in model.get_submodule(name).parameters()}
    if not set(biases) - inside:
        raise UserError(f"bitfit trains biases, and {type(model).__name__} has none")
    for parameter in (*biases, *inside):
        parameter.requires_grad = True
    return model


def count(model: ForeignModule) -> tuple[int, int]:
    """Numbers of trainable parameters and of all."""
    if hasattr(model, "get_nb_trainable_parameters"):
        # PEFT counts quantised weights unpacked.
        out: tuple[int, int] = model.get_nb_trainable_parameters()
        return out
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def is_adapter(model: nn.Module) -> bool:
    """Whether `save` writes an adapter rather than the whole model."""
    return adapter.is_added(model) or hasattr(model, "peft_config")


def save(model: ForeignModule, folder: str | Path) -> None:
    """Safetensors of what was trained: an adapter with the model's config beside it, or the model.

    The config tells how many labels a head has and what they are called.
    """
    if adapter.is_added(model):
        adapter.save(model, folder)
    else:
        model.save_pretrained(folder)
    if is_adapter(model):
        config = copy.deepcopy(model.config)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.pre_quantized:
            # It was quantised in loading: its checkpoint is not, and goes on to be loaded whole.
            vars(config).pop("quantization_config", None)
        config.save_pretrained(folder)


def load(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> nn.Module:
    """The base model with the adapter that `save` wrote; only safetensors are read.

    Raises: UserError for a folder that holds no adapter, or one that does not fit the model.
    """
    settings = read_settings(folder)
    if settings["peft_type"] == adapter.KIND:
        return adapter.load(model, folder, settings, trainable=trainable)
    from fastft.finetune.methods import through_peft

    need("peft", "an adapter")
    return through_peft.load(model, folder, trainable=trainable)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that may be loaded: of a known kind, in safetensors."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except FileNotFoundError:
        raise UserError(f"{folder}: no adapter here (adapter_config.json is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/adapter_config.json cannot be read: {error}") from None
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing; no other format is read")
    if kind not in (adapter.KIND, "LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING"):
        raise UserError(f"{folder}: adapters of type {kind} are not known here")
    # With these PEFT would load a tokenizer by name, its code included, or import a named module.
    for key in ("tokenizer_name_or_path", "tokenizer_kwargs", "megatron_config"):
        if settings.get(key):
            raise UserError(f"{folder}/adapter_config.json: {key} is refused")
    out: dict[str, Any] = settings
    return out
