"""fastft merge: an adapter into its base model, checked; or several adapters into one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastft.finetune import UserError, adapters, loading, methods, need, table
from fastft.finetune.assets import say
from fastft.finetune.config import LARGEST_SEED, Config, option
from fastft.finetune.run_folder import RunFolder, new_folder
from fastft.foreign import ForeignModule

# Relative difference of logits that rounding the merged weights to the type explains.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "ner", "CAUSAL_LM": "lm"}
_UNMERGEABLE = {
    methods.adapter.KIND: "a bottleneck is not linear, so no weight of the model can hold it",
    "PROMPT_TUNING": "virtual tokens are inputs, which no weight of the model can hold",
    "PREFIX_TUNING": "a prefix of keys and values is an input, which no weight can hold",
}


@dataclass(kw_only=True)
class MergeConfig(Config):
    """Merges an adapter into the weights of its base model, or collects several adapters.

    One adapter (LoRA, DoRA, IA3): the merged model is saved as safetensors that transformers loads
    without PEFT. It is loaded again and must give the adapter's logits on random tokens.
    Several: one folder with a folder for each, to be loaded into one base model.
    """

    adapter: list[str] = option(help="folders of runs or adapters, as many as are to be collected")
    output: str = option(help="folder to be made")
    names: list[str] | None = option(
        None, "what several adapters are called; default: as their folders"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "type of the merged weights"
    )
    tolerance: float | None = option(
        None, "relative difference of logits that is accepted; default: by dtype", above=0.0
    )
    seed: int = option(0, "the tokens of the check are drawn by it", least=0, most=LARGEST_SEED)

    def check(self) -> None:
        if not self.adapter:
            raise UserError("adapter: expected a folder")
        if len(self.adapter) == 1 and self.names:
            raise UserError("names: expected with several adapters, which are collected")
        if self.names and len(self.names) != len(self.adapter):
            raise UserError(
                f"names: expected one for each of {len(self.adapter)} adapters, "
                f"got {len(self.names)}"
            )
        for name in self.names or ():
            if Path(name).name != name or name in (".", "..", ""):
                raise UserError(f"names: {name!r} is no folder's name")


@dataclass
class MergeResult:
    """folder: what was written; difference and effect by adapter, relative to the logits.

    difference: of the logits of what was written from the adapter's own; effect: of the adapter's
    from its base model's.
    """

    folder: Path
    difference: dict[str, float]
    effect: dict[str, float]


def merge(config: MergeConfig) -> MergeResult:
    """Writes config.output, and prints a table. Raises: UserError, and then nothing is written."""
    need("peft", "merge")
    if Path(config.output).expanduser().exists():
        raise UserError(f"{config.output}: exists already; --output names another folder")
    folders = [_adapter_folder(source) for source in config.adapter]
    if len(folders) == 1:
        found = _merge(folders[0], config)
    else:
        found = _collect(folders, config)
    rows = [("adapter", "logits off by", "adapter changes them by")]
    rows += [(n, f"{found.difference[n]:.1e}", f"{e:.1e}") for n, e in found.effect.items()]
    print(table.text(rows))
    print(f"written to {found.folder}")
    return found


def _adapter_folder(source: str) -> Path:
    folder = Path(loading.locate(source))
    methods.read_settings(folder)
    return folder


def _merge(folder: Path, config: MergeConfig) -> MergeResult:
    settings = methods.read_settings(folder)
    if settings["peft_type"] in _UNMERGEABLE:
        raise UserError(f"{folder}: cannot be merged: {_UNMERGEABLE[settings['peft_type']]}")
    task = _task(settings)
    say(f"loading {settings['base_model_name_or_path']} and the adapter")
    model = loading.load_model(folder, task, dtype=config.dtype).eval()
    inputs = _inputs(model, config.seed)
    wanted, base = _logits(model, inputs), _base_logits(model, inputs)
    name = adapters.own_name(folder)
    effect = _apart(base, wanted)
    with new_folder(config.output) as part:
        _unwrap_heads(model)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{folder}: cannot be merged: {error}") from None
        merged.save_pretrained(part)
        loading.load_tokenizer(folder).save_pretrained(part)
        del model, merged  # the check needs the memory
        written = loading.load_model(part, task, dtype=config.dtype).eval()
        difference = _apart(_logits(written, inputs), wanted)
        _check(config, name, difference, effect)
        result = MergeResult(Path(config.output), {name: difference}, {name: effect})
        _write_metrics(part, config, result)
    return result


def _unwrap_heads(model: ForeignModule) -> None:
    """The trained heads in the place of PEFT's modules around them.

    PEFT 0.21 does that for IA3 as if a head were one layer, with a weight of its own.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            head: ForeignModule = module
            model.set_submodule(name, head.modules_to_save[head.active_adapter])


def _collect(folders: list[Path], config: MergeConfig) -> MergeResult:
    names = config.names or [adapters.own_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"names: expected different ones, got {', '.join(names)}")
    settings = [methods.read_settings(folder) for folder in folders]
    for key in ("base_model_name_or_path", "peft_type", "task_type"):
        if len(held := dict.fromkeys(str(one.get(key)) for one in settings)) > 1:
            raise UserError(f"adapter: expected the same {key} in all, got {', '.join(held)}")
    if settings[0]["peft_type"] == methods.adapter.KIND:
        raise UserError(f"{folders[0]}: a model takes one bottleneck adapter at a time")
    task, difference, effect = _task(settings[0]), {}, {}
    with new_folder(config.output) as part:
        for name, folder in zip(names, folders, strict=True):
            adapters.copy(folder, part / name)
        model = None
        for name, folder in zip(names, folders, strict=True):
            alone = loading.load_model(folder, task, dtype=config.dtype).eval()
            inputs = _inputs(alone, config.seed)
            wanted = _logits(alone, inputs)
            effect[name] = _apart(_base_logits(alone, inputs), wanted)
            if model is None:
                model = _all_in_one(part, names, alone, task, config.dtype)
            del alone
            model.set_adapter(name)
            difference[name] = _apart(_logits(model, inputs), wanted)
            _check(config, name, difference[name], effect[name])
        result = MergeResult(Path(config.output), difference, effect)
        _write_metrics(part, config, result)
    return result


def _all_in_one(part: Path, names: list[str], alone: Any, task: str, dtype: str) -> Any:
    """The base model with every collected adapter loaded from its folder."""
    model = loading.load_model(part / names[0], task, dtype=dtype).eval()
    for name in names:
        try:
            model.load_adapter(str(part / name), name, is_trainable=False)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{name}: not to be loaded beside the others: {error}") from None
    return model


def _task(settings: dict[str, Any]) -> str:
    kind = settings.get("task_type") or "CAUSAL_LM"
    if kind not in _TASKS:
        raise UserError(f"adapter: task_type {kind} is not known here")
    return _TASKS[kind]


def _inputs(model: ForeignModule, seed: int) -> list[Tensor]:
    """Rows of random tokens, each (1, length): one at a time, nothing is padded."""
    rows = model.get_input_embeddings().weight.shape[0]
    most = getattr(model.config, "max_position_embeddings", None) or 64
    taken = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    # RoBERTa's positions begin behind its padding token's.
    length = max(1, min(48, most - taken - 2))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(rows, (1, length), generator=generator) for _ in range(4)]


@torch.no_grad()
def _logits(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    found = []
    for ids in inputs:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # Those of virtual tokens come first, and the base model has none.
        logits = logits[:, -ids.shape[1] :] if logits.dim() == 3 else logits
        found.append(logits.flatten().double())
    return torch.cat(found)


def _base_logits(model: ForeignModule, inputs: list[Tensor]) -> Tensor:
    with model.disable_adapter():
        return _logits(model, inputs)


def _apart(got: Tensor, wanted: Tensor) -> float:
    """The difference's norm, relative to the wanted logits'; infinite for other shapes and NaN."""
    if got.shape != wanted.shape:
        return float("inf")
    apart = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return apart if apart == apart else float("inf")


def _check(config: MergeConfig, name: str, difference: float, effect: float) -> None:
    allowed = config.tolerance or _TOLERANCE[config.dtype]
    if difference > allowed:
        raise UserError(
            f"{name}: what would be written gives other logits than the adapter, {difference:.1e} "
            f"apart where {allowed:.1e} is accepted; nothing was written"
        )
    # In half types the rounding of the weights can be larger than all that was learnt.
    if config.dtype != "float32" and difference > effect / 2 > 0:
        raise UserError(
            f"{name}: {config.dtype} is too coarse for what the adapter changes ({effect:.1e}); "
            "merge in float32"
        )


def _write_metrics(part: Path, config: MergeConfig, result: MergeResult) -> None:
    held = {
        "adapters": config.adapter,
        "dtype": config.dtype,
        "tolerance": config.tolerance or _TOLERANCE[config.dtype],
        "difference": result.difference,
        "effect": result.effect,
    }
    RunFolder(part).write_json("metrics.json", held)
