"""The Trainer of a run: transformers' own, from our settings, with the task's collator and loss."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from fastft.finetune import tasks
from fastft.finetune.data import IGNORED
from fastft.finetune.run_folder import RunFolder
from fastft.foreign import ForeignModule

if TYPE_CHECKING:
    from datasets import Dataset


def build_trainer(
    config: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: dict[str, Any],
    loss: Callable[..., Any] | None = None, added: Callable[..., Any] | None = None, **more: Any,
) -> Trainer:  # fmt: skip
    """A transformers.Trainer, ready for `.train()`; it makes its folder of checkpoints.

    Args:
        config: a TrainConfig.
        model: from loading.load_model and methods.apply; patched or not.
        tokenizer: from loading.load_tokenizer.
        datasets: {"train": ..., "validation": ... or absent}, encoded by examples.encode.
        loss: (outputs, labels, num_items_in_batch=None) -> scalar instead of the task's own.
        added: (outputs, inputs, num_items_in_batch=None) -> scalar, added to the loss of training
            steps; inputs has the labels.
        more: given to Trainer's constructor over what is chosen here (callbacks, args, ...).
    """
    validated = datasets.get("validation") is not None
    task = tasks.of(config.task)
    options = {
        "args": arguments(config, validated),
        "data_collator": task.collator(tokenizer, config),
        "train_dataset": datasets["train"],
        "eval_dataset": datasets.get("validation"),
        "processing_class": tokenizer,
        "compute_loss_func": loss or loss_of(config, model, datasets["train"]),
        "preprocess_logits_for_metrics": getattr(task, "reduce", None),
        "callbacks": [EarlyStoppingCallback(config.early_stopping)]
        if config.early_stopping and validated
        else [],
    }
    if task.metrics is not None:
        compute = task.metrics(class_names(model), config)
        options["compute_metrics"] = lambda seen: numbers(compute(*_seen(seen)))
    trains = _Trainer(model=model, **options | more)
    trains.added = added
    return trains


class _Trainer(Trainer):
    """A Trainer whose training steps may have more to their loss than what is evaluated.

    The loss of an evaluation is a mean of its items (rows, tags, tokens), where Trainer's is one of
    batches, however few tokens one has.
    """

    added: Callable[..., Any] | None = None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **more: Any) -> Any:
        device = self.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, dtype=dtype, device=device)  # of loss times items, of items
        more["metric_key_prefix"] = metric_key_prefix
        found: Any = super().evaluation_loop(*args, **more)
        total, items = self.accelerator.reduce(self._sums, "sum").tolist()
        if items:
            found.metrics[f"{metric_key_prefix}_loss"] = total / items
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        given = dict(inputs)  # Trainer takes the labels out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.is_grad_enabled():
            items: Any = num_items_in_batch
            if items is None:
                items = (given["labels"] != IGNORED).sum()
            self._sums += torch.stack([loss.detach().mean() * items, items]).to(self._sums)
        if self.added is not None and torch.is_grad_enabled():
            more = self.added(outputs, given, num_items_in_batch)
            # As Trainer does with the loss: gradients are averaged over the processes that share
            # the step's items.
            shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
            loss = loss + more * (self.accelerator.num_processes if shared else 1)
        return (loss, outputs) if return_outputs else loss


def arguments(config: Any, validated: bool = True) -> TrainingArguments:
    """config as transformers' TrainingArguments; validated: there is data to evaluate on."""
    gpu = torch.accelerator.is_available()
    every = "epoch" if config.evaluate_every is None else "steps"
    best = tasks.of(config.task).BEST
    # A name that transformers is about to change: only given where it is asked for.
    chosen: dict[str, Any] = (
        {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
    )
    if config.fsdp:
        chosen["fsdp"] = True
    if validated and (config.best or config.early_stopping):
        chosen |= {
            "load_best_model_at_end": config.best,
            "metric_for_best_model": f"eval_{best}",
            "greater_is_better": best != "loss",
        }
    return TrainingArguments(
        output_dir=str(RunFolder(config.output).checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        use_cpu=not gpu,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        eval_strategy=every if validated else "no",
        save_strategy=every,
        eval_steps=config.evaluate_every,
        save_steps=config.evaluate_every or 500,
        save_total_limit=None,  # `checkpoints.Keeper` removes them
        logging_steps=config.logging_steps,
        report_to=config.report_to,
        seed=config.seed,
        remove_unused_columns=False,  # the tasks' datasets hold what the model takes
        dataloader_pin_memory=gpu,
        deepspeed=config.deepspeed,
        **chosen,
    )


def loss_of(config: Any, model: nn.Module, train: "Dataset") -> Callable[..., Any] | None:
    """The task's loss for Trainer; None where the model's own is right."""
    from fastft.finetune import loss

    labelled = config.task in ("classify", "ner")
    return loss.make(
        config,
        train["labels"] if labelled else None,
        names=class_names(model) if labelled else None,
        multi_label=config.multi_label,
    )


def class_names(model: ForeignModule) -> list[str]:
    names = model.config.id2label
    return [names[i] for i in sorted(names)]


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """What of nested metrics can stand in a log."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def measure(trainer: Trainer, dataset: "Dataset", config: Any) -> dict[str, Any]:
    """The task's metrics on dataset, and the loss there."""
    from fastft.finetune import metrics

    seen = trainer.predict(dataset, metric_key_prefix="eval")
    found = {"loss": (seen.metrics or {})["eval_loss"]}
    task = tasks.of(config.task)
    if task.metrics is None:
        return found | {"perplexity": metrics.perplexity(found["loss"])}
    compute = task.metrics(class_names(trainer.model), config)
    out: dict[str, Any] = found | compute(seen.predictions, seen.label_ids)
    return out


def _seen(evaluation: Any) -> tuple[Any, ...]:
    predictions = evaluation.predictions
    # Some heads give hidden states after the logits.
    return predictions[0] if isinstance(predictions, tuple) else predictions, evaluation.label_ids
