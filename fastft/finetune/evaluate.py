"""`fastft evaluate`: models on data they have not seen, side by side."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.finetune import UserError, loading, need, plots, reading, run_folder, table, tasks
from fastft.finetune.config import option
from fastft.finetune.prompting import PromptConfig
from fastft.finetune.run_folder import RunFolder
from fastft.finetune.train import TrainConfig


@dataclass(kw_only=True)
class EvaluateConfig(PromptConfig):
    """Measures one model or several on one file or several.

    fastft evaluate --model runs/train --data reviews/ --base all-MiniLM-L6-v2
    fastft evaluate --model gpt2 --data reviews.csv --task prompt --template sentiment
        --examples train.csv --shots 5 --calibrate
    fastft evaluate --model runs/old runs/new --data old.csv new.csv    what was forgotten
    """

    model: list[str] = option(help="run folders, local folders, adapter folders or hub names")
    data: list[str] = option(help="files, or folders with train, validation and test files")
    task: Literal["classify", "ner", "lm", "sft", "prompt"] | None = option(
        None,
        "prompt: a language model classifies by the likelihood of each label; default: what the "
        "first model was trained for",
    )
    base: str | None = option(None, "a model to compare with, measured first")
    split: Literal["train", "validation", "test"] | None = option(
        None, "which file of a folder; default: test, or else validation"
    )
    output: str = option("runs/evaluate", "folder for metrics and plots; must not exist yet")
    text_column: str | None = option(None, "where texts are; default: the run's, or text (tokens)")
    label_column: str | None = option(None, "where labels are; default: the run's, or label (tags)")
    multi_label: bool = option(False, "classify: any number of labels per text")
    learn: Literal["completion", "assistant", "all"] = option(
        "completion", "sft: what is measured: the last answer, every answer, or every token"
    )
    max_length: int | None = option(None, "tokens per example; default: as in train", least=4)
    batch_size: int = option(16, "examples (prompt: texts) per forward pass", least=1)
    labels: list[str] | None = option(None, "prompt: the labels in the data; default: all in it")
    label_words: list[str] | None = option(
        None, "prompt: what stands for each of the labels; default: their names"
    )
    calibrate: bool = option(False, "prompt: take out what is likely whatever the text says")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "prompt: type of the weights"
    )
    patch: bool = option(True, "predict with fastft's kernels")
    threads: int | None = option(None, "of the CPU; default: PyTorch's choice", least=1)

    # Of a run folder, which this is too: an evaluation always begins anew.
    resume = False

    def check(self) -> None:
        super().check()
        for name, values in (("model", self.models), ("data", self.data)):
            if len(set(values)) < len(values):
                raise UserError(f"{name}: every one once")
        asked = {
            "template": self.template,
            "shots": self.shots,
            "labels": self.labels,
            "label_words": self.label_words,
            "calibrate": self.calibrate,
        }
        for name, value in asked.items():
            if value and self.task != "prompt":
                raise UserError(f"{name}: only for the task prompt")
        if self.label_words is not None and self.labels is None:
            raise UserError("label_words: name the labels too, in the same order")

    @property
    def models(self) -> list[str]:
        """All that are measured, base first."""
        return [*([self.base] if self.base is not None else []), *self.model]


@dataclass(frozen=True)
class EvaluateResult:
    """scores: model -> data -> the task's metrics (fastft.finetune.metrics)."""

    folder: Path
    scores: dict[str, dict[str, dict[str, Any]]]
    metrics: dict[str, Any]


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measures every model on every data set; prints a table and fills the folder config.output.

    metrics.json has the scores, and with several of both `matrix`: models by data, the metric that
    chooses the best checkpoint of the task (loss: lower is better). Beside it predictions and a
    confusion matrix of each, and forgetting.png.
    Raises: UserError.
    """
    need("datasets", "evaluation")
    import torch

    run_folder.check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = _settled(config)
    rows = {name: _rows(config, name) for name in config.data}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    files: dict[str, tuple[Any, ...]] = {}
    for i, source in enumerate(config.models, 1):
        scores[source] = {}
        measure = _measurer(config, source, rows)
        for j, (name, (split, held)) in enumerate(rows.items(), 1):
            try:
                found, predictions, classes, report = measure(name, split, held)
            except UserError as error:
                raise UserError(f"{source} on {name}: {error}") from None
            scores[source][name] = found
            files[_place(config, i, source, j, name)] = (found, predictions, classes, report)
    best = "f1_macro" if config.task == "prompt" else tasks.of(str(config.task)).BEST
    matrix = [[scores[model][name][best] for name in rows] for model in scores]
    metrics = {
        "task": config.task,
        "rows": {name: len(held) for name, (_, held) in rows.items()},
        "scores": scores,
        "metric": best,
        "matrix": matrix,
    }
    folder = run_folder.start(config, [_file(config, name)[1] for name in rows])
    for place, held in files.items():
        _keep(folder, place, *held)
    if len(matrix) > 1 and len(rows) > 1:
        names, models = [[_short(n, all_) for n in all_] for all_ in (config.data, config.models)]
        plots.forgetting(matrix, names, folder.path / "forgetting.png", models)
    folder.write_json("metrics.json", metrics)
    print(summary(metrics, folder))
    return EvaluateResult(folder.path, scores, metrics)


def summary(metrics: dict[str, Any], folder: RunFolder) -> str:
    """The final table: of each data set, a column for each model."""
    models = list(metrics["scores"])
    lines = []
    for name, count in metrics["rows"].items():
        found = [metrics["scores"][model][name] for model in models]
        numbers = [key for key, value in found[0].items() if isinstance(value, int | float)]
        rows = [["", *models], *([key, *(own[key] for own in found)] for key in numbers)]
        lines += [f"{name}: {count} rows, {metrics['task']}", table.text(rows), ""]
    if len(models) > 1 and len(metrics["rows"]) > 1:
        rows = [[f"{metrics['metric']} of", *(f"on {name}" for name in metrics["rows"])]]
        rows += [[model, *own] for model, own in zip(models, metrics["matrix"], strict=True)]
        lines += [table.text(rows), ""]
    return "\n".join([*lines, f"{folder.path}/: metrics.json, predictions, plots"])


def _settled(config: EvaluateConfig) -> EvaluateConfig:
    """config with what the first model's run was trained with, where nothing else is asked for."""
    from dataclasses import replace

    import yaml

    settings = RunFolder(config.model[0]).settings
    known = {}
    if settings.is_file():
        with loading.as_user_error(settings):
            known = yaml.safe_load(settings.read_text(encoding="utf-8"))
    if config.task == "prompt":
        return config
    if config.task is None and known.get("task") not in tasks.TASKS:
        raise UserError(f"task: {config.model[0]} is no run folder that would know its task")
    chosen: dict[str, Any] = {"task": config.task or known["task"]}
    if chosen["task"] == known.get("task"):
        for name in ("text_column", "label_column", "multi_label", "learn", "max_length"):
            given = getattr(config, name)
            default = type(config).__dataclass_fields__[name].default
            if given == default and known.get(name) is not None:
                chosen[name] = known[name]
    return replace(config, **chosen)


def _file(config: EvaluateConfig, name: str) -> tuple[str, Path]:
    """The split that is measured, and its file."""
    place = reading.located(name)
    if not place.is_dir():
        return config.split or "test", place
    found = reading.split_files(place)
    split = config.split or next((s for s in ("test", "validation") if s in found), "train")
    if split not in found:
        raise UserError(f"{name}: no {split} file in it")
    return split, found[split]


def _rows(config: EvaluateConfig, name: str) -> tuple[Any, ...]:
    split, file = _file(config, name)
    return split, reading.rows(file)


def _measurer(config: EvaluateConfig, source: str, rows: dict[str, Any]) -> Callable[..., Any]:
    """(data, split, rows) -> metrics, predictions, class names, fastft.patch's report."""
    from fastft.finetune import measuring

    if config.task == "prompt":
        return measuring.by_prompt(config, source)
    shared = ("text_column", "label_column", "multi_label", "learn", "max_length", "batch_size")
    options = {name: getattr(config, name) for name in ("task", *shared)}
    settings = TrainConfig(
        model=source,
        data=next(iter(rows)),
        output=config.output,
        packing=False if config.task == "sft" else None,
        **options,
        **measuring.learned_prompt(source),
    )
    names = [found for m in [source, *config.models] if (found := loading.known_labels(m))]
    return measuring.by_task(settings, names, config.patch)


def _place(config: EvaluateConfig, i: int, source: str, j: int, name: str) -> str:
    """Where the files of one measurement are: numbered folders where there are several."""
    if len(config.models) * len(config.data) == 1:
        return ""
    own = [re.sub(r"[^\w.-]+", "_", Path(text).name).strip("._") for text in (source, name)]
    return f"{i}-{own[0]}/{j}-{own[1]}/"


def _short(name: str, among: list[str]) -> str:
    """The last part of a path, where that tells it from the others."""
    ends = [Path(other).name for other in among]
    return Path(name).name if ends.count(Path(name).name) == 1 else name


def _keep(
    folder: RunFolder, place: str, found: Any, predictions: Any, classes: Sequence[str], report: Any
) -> None:
    with run_folder.readable(str(folder.path)):
        (folder.path / place).mkdir(parents=True, exist_ok=True)
    own = RunFolder(folder.path / place)
    own.write("patch.txt", f"{report or 'not patched: patch was off'}\n")
    if predictions:
        lines = [json.dumps(row, ensure_ascii=False) for row in predictions]
        own.write("predictions.jsonl", "\n".join(lines) + "\n")
    if "confusion" in found:
        plots.confusion(found["confusion"], classes, own.path / "confusion.png")
