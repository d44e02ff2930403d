"""One run: the model made ready, trained, measured and kept in its folder."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.decode.peak_memory import peak
from fastft.finetune import (
    UserError,
    adapters,
    assets,
    checkpoints,
    continual,
    examples,
    loading,
    methods,
    plots,
    table,
    tasks,
    trainer,
    vocabulary,
)
from fastft.finetune.loss import NextTokenLoss
from fastft.finetune.run_folder import PARTIAL, RunFolder, processes, readable, sync
from fastft.finetune.train import RunResult, TrainConfig
from fastft.losses import ClassificationLoss

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# The methods whose adapters a model may come with, by the type in their configuration.
_KINDS = {
    "LORA": ("lora", "dora", "qlora"),
    "IA3": ("ia3",),
    "PROMPT_TUNING": ("prompt",),
    "PREFIX_TUNING": ("prefix",),
}


@dataclass
class Prepared:
    """What training needs.

    config: with max_length settled. report: fastft.patch's, or None. loss, added: as build_trainer
    takes them. beside: other adapters that are kept with the one that is trained.
    """

    config: TrainConfig
    model: Any
    tokenizer: Any
    datasets: dict[str, Any]
    report: Any
    loss: Callable[..., Any] | None = None
    added: Callable[..., Any] | None = None
    beside: dict[str, Path] = field(default_factory=dict)


def prepare(config: TrainConfig, rows: dict[str, Any]) -> Prepared:
    """Model, tokenizer and encoded rows of a run; the same for the same config and rows.

    rows: from examples.read. Raises: UserError.
    """
    import torch
    from transformers import set_seed

    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("precision: fp16 needs a GPU; bf16 and float32 run here")
    if config.fsdp and not torch.accelerator.is_available():
        raise UserError("fsdp: Trainer shards on GPUs alone; without fsdp these processes run DDP")
    if config.fsdp and config.method == "adapter":
        raise UserError("fsdp: not with the method adapter")
    _check_integrations(config)
    task = tasks.of(config.task)
    packed = config.task == "sft" and task.packs(config)
    reason = methods.fits(
        config.method, config.task, packing=packed, checkpointing=config.gradient_checkpointing
    )
    if reason is not None:
        raise UserError(f"method {config.method} does not fit task {config.task}: {reason}")
    beside = {}
    if config.adapter_name is not None:
        beside = adapters.held(config.model)
        config = replace(config, model=adapters.base(config.model, config.adapter_name))
    tokenizer = load_tokenizer(config)
    names = task.names(rows["train"], config, loading.known_labels(config.model))
    old = continual.old_rows(config)
    names = continual.all_names(names, old, config)
    longest = examples.limit(config, tokenizer, loading.load_config(config.model))
    config = replace(config, max_length=longest)
    datasets = examples.encode(rows, tokenizer, config, names)
    embedded = loading.embedded(config.model)
    for split, held in datasets.items():
        vocabulary.check(held["input_ids"], tokenizer, embedded, f"{split}: ")
    old = continual.encode(old, tokenizer, config, names)
    if config.replay:
        datasets["train"] = continual.replayed(datasets["train"], old, config.replay, config.seed)
    set_seed(config.seed)  # new heads and adapters are drawn from it
    if config.base_weights == "fp8":
        check_base("fp8", processes().device)
    model = with_method(load_model(config, tokenizer, names), config)
    report = None
    if config.patch:
        from fastft.patch import patch

        kind = None if config.base_weights == "none" else config.base_weights
        if kind == "fp8":  # only where it is computed: Trainer would move the model later
            model.to(processes().device)
        report = patch(model, base_weights=kind)
        if kind is not None and not report.count(f"{kind}_linear"):
            why = [e.reason for e in report.left if e.reason.startswith("base_weights=")]
            raise UserError(f"{config.model}: {', '.join(why)}")
    loss = trainer.loss_of(config, model, datasets["train"])
    if config.distill and loss is None:
        loss = NextTokenLoss(ClassificationLoss())  # its logits are needed anyway
    added = continual.keeping(config, model, tokenizer, names, old)
    return Prepared(config, model, tokenizer, datasets, report, loss, added, beside)


def _check_integrations(config: TrainConfig) -> None:
    """UserError where Trainer would miss what config asks of it, once the folder is made."""
    from transformers.integrations import integration_utils as known

    for name in config.report_to:
        if name in ("none", "all"):
            continue
        if name not in known.INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"report_to: expected none, all or some of "
                f"{', '.join(known.INTEGRATION_TO_CALLBACK)}, got {name!r}"
            )
        # Its list of those that are installed leaves this one out.
        if name != "flyte" and name not in known.get_available_reporting_integrations():
            raise UserError(f"report_to: {name} is not installed")
    if config.deepspeed is not None:
        if not Path(config.deepspeed).is_file():
            raise UserError(f"deepspeed: {config.deepspeed}: no such file")
        if find_spec("deepspeed") is None:
            raise UserError("deepspeed: not installed: pip install deepspeed")


def check_base(kind: str, device: "torch.device") -> None:
    """Raises: UserError where the device cannot compute over a base of this kind."""
    from fastft.patch.base_weights import check_kind

    try:
        if kind != "none":
            check_kind(kind, [device])
    except ValueError as error:
        raise UserError(str(error)) from None


def load_tokenizer(config: TrainConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of config.model, with a chat template where the task needs one."""
    tokenizer = loading.load_tokenizer(config.model, words=config.task == "ner")
    if config.task == "sft" and tokenizer.chat_template is None:
        from fastft.finetune.tasks import sft

        assets.say(f"{config.model}: no chat template; alpaca's form is used and saved with it")
        tokenizer.chat_template = sft.TEMPLATE
    return tokenizer


def load_model(
    config: TrainConfig, tokenizer: "PreTrainedTokenizerBase", names: Sequence[str] | None
) -> "nn.Module":
    # Of a frozen base half the bits do; what is trained is kept whole.
    frozen = config.task in ("lm", "sft") and config.method in ("lora", "dora", "qlora")
    return loading.load_model(
        config.model,
        config.task,
        dtype="bfloat16" if frozen and config.precision == "bf16" else "float32",
        labels=names,
        multi_label=config.multi_label,
        dropout=config.dropout,
        pad_id=tokenizer.pad_token_id,
        quantize=config.method == "qlora",
        trainable=True,
        base_weights=config.base_weights,
    )


def with_method(model: "nn.Module", config: TrainConfig) -> "nn.Module":
    """The model with what config.method trains; an adapter that it came with goes on training."""
    if not methods.is_adapter(model):
        return methods.apply(model, config, config.task)
    settings = methods.read_settings(loading.locate(config.model))
    allowed = _KINDS.get(settings["peft_type"], ("adapter",))
    if config.method not in allowed:
        raise UserError(
            f"{config.model}: an adapter; the method {' or '.join(allowed)} goes on training it, "
            f"for {config.method} merge it first or start from its base model"
        )
    return model


def run(prepared: Prepared, folder: RunFolder, callbacks: Sequence[Any] = ()) -> RunResult:
    """Trains, measures and keeps; prints the final table. callbacks: more of Trainer's.

    Raises: KeyboardInterrupt after Ctrl-C, with a checkpoint to go on from; UserError.
    """
    config, started = prepared.config, time.perf_counter()
    model, tokenizer, datasets = prepared.model, prepared.tokenizer, prepared.datasets
    trains = trainer.build_trainer(
        config, model, tokenizer, datasets, prepared.loss, prepared.added
    )
    for callback in callbacks:
        trains.add_callback(callback)
    main = trains.is_world_process_zero()
    if main:
        folder.write("patch.txt", f"{prepared.report or 'not patched: patch was off'}\n")
    checkpoints.fit(trains, folder, config.resume)
    seconds = time.perf_counter() - started
    held: list[str] = [split for split in ("validation", "test") if split in datasets]
    measured: dict[str, Any] = {
        split: trainer.measure(trains, datasets[split], config) for split in held
    }
    trainable, parameters = methods.count(model)
    log = trains.state.log_history
    metrics: dict[str, Any] = {
        "task": config.task,
        "method": config.method,
        "model": config.model,
        "seed": config.seed,
        "max_length": config.max_length,
        "rows": {split: len(rows) for split, rows in datasets.items()},
        "steps": trains.state.global_step,
        "epochs": trains.state.epoch,
        "best_step": trains.state.best_global_step,
        "loss": checkpoints.mean_loss(log),
        "seconds": seconds,
        "parameters": {"trainable": trainable, "all": parameters},
        "peak_memory_bytes": peak(trains.args.device),
        **measured,
    }
    kept = keep(trains, prepared, folder)
    if main:
        folder.write_json("log.json", log)
        plots.curves(log, folder.path / "curves.png")
        last = measured.get("test", measured.get("validation", {}))
        if "confusion" in last:
            names = trainer.class_names(model)
            plots.confusion(last["confusion"], names, folder.path / "confusion.png")
        folder.write_json("metrics.json", metrics)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)  # the model is kept
        print(summary(metrics, folder))
    processes().wait_for_everyone()  # whoever returns finds the folder complete
    return RunResult(folder.path, metrics, kept)


def keep(trains: Any, prepared: Prepared, folder: RunFolder) -> Path:
    """The trained weights under folder.model, renamed into place when they are complete.

    An adapter with a name is in a folder of that name there, the others beside it.
    """
    name = prepared.config.adapter_name
    kept = folder.model / (name or "")
    if trains.is_fsdp_enabled:  # its weights are gathered from all processes
        trains.save_model(str(folder.model))
        return kept
    if not trains.is_world_process_zero():
        return kept
    aside = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder.path)
    with readable(str(folder.model)), aside as part:
        made = Path(part) / "model"
        loading.save(trains.model, prepared.tokenizer, made / (name or ""))
        for other, source in prepared.beside.items():
            adapters.copy(source, made / other)
        sync(made)
        if folder.model.exists():  # of an end that was interrupted
            shutil.rmtree(folder.model)
        made.rename(folder.model)
    return kept


def summary(metrics: dict[str, Any], folder: RunFolder) -> str:
    """The final table."""
    counts = metrics["parameters"]
    splits = [split for split in ("validation", "test") if split in metrics]
    rows = [["", *splits]]
    for name in trainer.numbers(metrics[splits[0]]) if splits else ():
        rows.append([name, *(metrics[split].get(name, "") for split in splits)])
    share = 100 * counts["trainable"] / counts["all"]
    lines = [
        f"{metrics['task']}, {metrics['method']}: {metrics['steps']} steps in "
        f"{metrics['seconds']:.0f} s, {counts['trainable']:,} of {counts['all']:,} parameters "
        f"trained ({share:.3g} %), {metrics['peak_memory_bytes'] / 2**20:.0f} MB at most",
        *([table.text(rows)] if splits else []),
        f"model: {folder.model}",
    ]
    return "\n".join(lines)
