"""One model on one data set: the task's metrics, and what was predicted for each row."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastft.finetune import (
    UserError,
    examples,
    loading,
    methods,
    metrics,
    running,
    tasks,
    trainer,
    vocabulary,
)
from fastft.finetune.data import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

# metrics, a row per prediction, names of the classes, fastft.patch's report
Measured = tuple[dict[str, Any], list[dict[str, Any]], list[str] | None, str | None]


def by_prompt(config: Any, source: str) -> Callable[..., Measured]:
    """Of an EvaluateConfig: labels by their likelihood after a prompt."""
    from fastft.finetune import prompted
    from fastft.finetune.serving import serving

    model, tokenizer, report = serving(source, config)

    def measure(name: str, split: str, rows: "Dataset") -> Measured:
        found, predictions = prompted.measure(config, model, tokenizer, rows)
        return found, predictions, list(found["per_class"]), report

    return measure


def by_task(config: Any, learned: list[list[str]], patched: bool) -> Callable[..., Measured]:
    """Of a TrainConfig: what the model was trained for.

    learned: the classes that it learned, or else those of another model that is measured, first;
    behind them the others'. A row whose class only others have learned is one that it misses.
    """
    tokenizer = running.load_tokenizer(config)
    longest = examples.limit(config, tokenizer, loading.load_config(config.model))
    config = replace(config, max_length=longest)
    task = tasks.of(config.task)
    names = learned[0] if learned else None
    held: list[Any] = []  # the model, once the classes are known

    def measure(name: str, split: str, rows: "Dataset") -> Measured:
        nonlocal names
        own = replace(config, data=name)
        names = names or task.names(rows, own)
        classes = names
        if names is not None:
            missed = task.labels_in(rows, own) & set(sum(learned, [])) - set(names)
            classes = [*names, *sorted(missed)]
        encoded = examples.encode({split: rows}, tokenizer, own, classes)[split]
        vocabulary.check(encoded["input_ids"], tokenizer, loading.embedded(config.model))
        if not held:
            held.extend(_ready(running.load_model(own, tokenizer, names), patched))
        model, report = held
        if task.metrics is None:
            loss = token_loss(model, encoded, task.collator(tokenizer, own), own.batch_size)
            return {"loss": loss, "perplexity": metrics.perplexity(loss)}, [], None, report
        with tempfile.TemporaryDirectory() as scratch:  # Trainer makes its folder at once
            own = replace(own, output=scratch)
            asked = _without(encoded, len(names), own) if len(classes) > len(names) else encoded
            runs = trainer.build_trainer(
                own, model, tokenizer, {"train": asked}, compute_metrics=None
            )
            seen = runs.predict(asked, metric_key_prefix="eval")
        logits = seen.predictions[0] if isinstance(seen.predictions, tuple) else seen.predictions
        labels, loss = seen.label_ids, (seen.metrics or {})["eval_loss"]
        if asked is not encoded:
            logits, labels = _with(encoded, len(classes), own, logits, labels)
            loss = math.inf  # of a class that has no probability
        found = {"loss": loss} | task.metrics(classes, own)(logits, labels)
        return found, predictions(own, logits, labels, classes), classes, report

    return measure


def _without(encoded: "Dataset", known: int, config: Any) -> "Dataset":
    """encoded without the labels of classes that the model, which knows so many, has not."""

    def one(labels: Any) -> Any:
        if config.multi_label:
            return labels[:known]
        if isinstance(labels, list):
            return [label if label < known else IGNORED for label in labels]
        return labels if labels < known else IGNORED

    labels = [one(row) for row in encoded["labels"]]
    return encoded.remove_columns("labels").add_column("labels", labels)


def _with(
    encoded: "Dataset", classes: int, config: Any, logits: Any, labels: Any
) -> tuple[Any, Any]:
    """logits and labels of what `_without` gave, the unknown classes in them again."""
    import numpy as np

    if config.task == "ner":  # tags were predicted, not logits
        labels = np.full_like(labels, IGNORED)
        for row, own in zip(labels, encoded["labels"], strict=True):
            row[: len(own)] = own
        return logits, labels
    more = [(0, 0), (0, classes - logits.shape[1])]
    return np.pad(logits, more, constant_values=-np.inf), np.array(encoded["labels"][:])


def learned_prompt(source: str) -> dict[str, Any]:
    """Settings by which a TrainConfig knows of a prompt that the model's adapter has learned."""
    place = loading.locate(source)
    kinds = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
    if not (Path(place) / loading.ADAPTER).is_file():
        return {}
    settings = methods.read_settings(place)
    if settings["peft_type"] not in kinds:
        return {}
    return {
        "method": kinds[settings["peft_type"]],
        "virtual_tokens": settings["num_virtual_tokens"],
    }


def token_loss(
    model: nn.Module, encoded: Any, collate: Callable[..., Any], batch_size: int
) -> float:
    """Mean cross entropy in nats over all labelled tokens of an encoded dataset."""
    import torch
    from torch.utils.data import DataLoader

    # Not Trainer's eval_loss: it is a mean of batches, whatever number of tokens they have.
    total, tokens = 0.0, 0
    for batch in DataLoader(encoded, batch_size, collate_fn=collate):
        batch = {name: values.to(model.device) for name, values in batch.items()}
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        with torch.no_grad():
            total += model(**batch).loss.double().item() * labelled
        tokens += labelled
    if tokens == 0:
        raise UserError("no token to predict")
    return total / tokens


def predictions(config: Any, logits: Any, labels: Any, names: list[str]) -> list[dict[str, Any]]:
    """A row for each example: what is true, what was predicted and how surely."""
    import torch

    if config.task == "ner":
        return [
            {
                "index": i,
                "tags": [names[tag] for tag in row[row != IGNORED]],
                "predicted": [names[tag] for tag in found[row != IGNORED]],
            }
            for i, (row, found) in enumerate(zip(labels, logits, strict=True))
        ]
    logits = torch.from_numpy(logits).double()
    chances = logits.sigmoid() if config.multi_label else logits.softmax(-1)
    rows = []
    for i, (label, row) in enumerate(zip(labels, chances.tolist(), strict=True)):
        if config.multi_label:
            true = [name for name, there in zip(names, label, strict=True) if there]
            found = [name for name, chance in zip(names, row, strict=True) if chance >= 0.5]
        else:
            true, found = names[label], names[row.index(max(row))]
        chances_of = dict(zip(names, row, strict=True))
        rows.append({"index": i, "label": true, "predicted": found, "probabilities": chances_of})
    return rows


def _ready(model: nn.Module, patched: bool) -> tuple[nn.Module, str | None]:
    import torch

    from fastft.patch import patch

    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, str(patch(model)) if patched else None
