"""A run without training: its settings, examples as the model sees them, what it would take."""

import math
import tempfile
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.finetune import memory_use, methods, run_folder, running, table, trainer
from fastft.finetune.data import IGNORED
from fastft.finetune.train import RunResult, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # examples
LONGEST = 400  # characters of a part


def show(config: TrainConfig, rows: dict[str, Any]) -> RunResult:
    """Prints settings, examples and estimates; trains nothing and writes nothing."""
    from fastft.finetune import examples

    if config.folds:
        rows = examples.folds(rows, config)[0]
    prepared = running.prepare(replace(config, seed=(config.seeds or [config.seed])[0]), rows)
    settled = replace(prepared.config, learning_rate=prepared.config.rate)
    print(run_folder.yaml_of(settled))
    if prepared.report is not None:
        print(f"{prepared.report}\n")
    names = trainer.class_names(prepared.model) if config.task in ("classify", "ner") else None
    train = prepared.datasets["train"]
    for number, row in enumerate(train.select(range(min(SHOWN, len(train))))):
        print(f"example {number + 1}: {len(row['input_ids'])} tokens")
        print(masked(row, prepared.tokenizer, names) + "\n")
    found = estimate(prepared) | {"runs": config.folds or len(config.seeds or [0])}
    print(table.text(_lines(found)))
    return RunResult(Path(config.output), found)


def masked(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", names: list[str] | None
) -> str:
    """An example's text beside what is learned of it: a class, tags, or the tokens marked >."""
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(labels, list) and names is not None:
        return f"  {tokenizer.decode(ids)[:LONGEST]}\n> {names[labels]}"
    if names is not None and len(labels) != len(ids):
        chosen = [name for name, label in zip(names, labels, strict=True) if label]
        return f"  {tokenizer.decode(ids)[:LONGEST]}\n> {', '.join(chosen) or '(none)'}"
    tokens = list(zip(ids, labels, strict=True))
    if names is not None:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        return "\n".join(
            f"  {piece}" if label == IGNORED else f"> {piece}  {names[label]}"
            for piece, label in zip(pieces, labels, strict=True)
        )[: 4 * LONGEST]
    lines = []
    for learned, part in groupby(tokens, key=lambda token: token[1] != IGNORED):
        text = str(tokenizer.decode([token for token, _ in part]))[:LONGEST]
        lines += [f"{'>' if learned else ' '} {line}" for line in text.splitlines() or [""]]
    return "\n".join(lines)


def estimate(prepared: running.Prepared) -> dict[str, Any]:
    """Steps, seconds and bytes of a run, from a forward and backward pass over two batches.

    Seconds leave out evaluation and the optimizer's own; activations are those of the longest rows.
    """
    config, train = prepared.config, prepared.datasets["train"]
    with tempfile.TemporaryDirectory() as folder:  # Trainer makes one
        apart = replace(config, output=folder)
        trains: Any = trainer.build_trainer(
            apart, prepared.model, prepared.tokenizer, prepared.datasets, prepared.loss,
            prepared.added,
        )  # fmt: skip
    lengths = [len(ids) for ids in train["input_ids"]]
    longest = sorted(range(len(train)), key=lambda i: -lengths[i])[: config.batch_size]
    collate = trains.data_collator
    with memory_use.kept_for_backward(trains.model) as kept:
        _pass(trains, collate([train[i] for i in longest]))  # warms up as well
    started = time.perf_counter()
    _pass(trains, next(iter(trains.get_train_dataloader())))
    seconds = time.perf_counter() - started
    per_epoch = math.ceil(len(train) / config.batch_size / config.gradient_accumulation)
    steps = config.steps or math.ceil(per_epoch * config.epochs)
    trainable, parameters = methods.count(prepared.model)
    memory = memory_use.of_weights(prepared.model) | {"activations": sum(kept.values())}
    return {
        "rows": {split: len(rows) for split, rows in prepared.datasets.items()},
        "tokens_per_epoch": sum(lengths),
        "steps": steps,
        "seconds": seconds * config.gradient_accumulation * steps,
        "parameters": {"trainable": trainable, "all": parameters},
        "memory_bytes": memory,
    }


def _pass(trains: Any, batch: dict[str, Any]) -> None:
    model = trains.model.train()
    with trains.compute_loss_context_manager():
        loss = trains.compute_loss(model, trains._prepare_inputs(batch))
    loss.backward()
    model.zero_grad(set_to_none=True)


def _lines(found: dict[str, Any]) -> list[list[Any]]:
    megabytes = {name: n / 2**20 for name, n in found["memory_bytes"].items()}
    return [
        ["estimate", ""],
        *([f"rows, {split}", count] for split, count in found["rows"].items()),
        ["tokens per epoch", found["tokens_per_epoch"]],
        ["steps", found["steps"]],
        ["runs", found["runs"]],
        ["minutes", found["runs"] * found["seconds"] / 60],
        ["trained parameters", found["parameters"]["trainable"]],
        ["all parameters", found["parameters"]["all"]],
        *([f"MB, {name}", size] for name, size in megabytes.items()),
        ["MB", sum(megabytes.values())],
    ]
