"""`fastft search`: runs of `fastft train` over a space of settings, and the best of them."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastft.finetune import UserError, need, table
from fastft.finetune.config import alternatives, option
from fastft.finetune.run_folder import RunFolder
from fastft.finetune.train import TrainConfig

RANGES = ("log", "linear")
# What says which question is asked, or where; trials that differ here could not be compared.
_FIXED = {
    "task", "data", "validation_data", "validation", "text_column", "label_column", "multi_label",
    "learn", "output", "resume", "dry_run", "folds", "seeds", "report_to", "threads", "best",
}  # fmt: skip


@dataclass(kw_only=True)
class SearchConfig(TrainConfig):
    """Searches settings of `fastft train` that give the best validation score.

    A settings file as train takes it, with a list where a value is searched: choices, or the two
    ends of a range and how it is walked. The same on the command line is an entry of --space.

        learning_rate: [1e-5, 1e-3, log]      a range, by its logarithm
        lora_dropout: [0, 0.3, linear]        a range, evenly; of whole numbers both ends are in it
        method: [lora, bitfit, full]          choices
        trials: 8

    fastft search settings.yaml --space "rank: [4, 8, 16]" "warmup: [0, 0.2, linear]"
    """

    LISTS = "space"  # where config.read puts lists that are given for single values

    output: str = option("runs/search", help="the search's folder; must not exist yet")
    space: list[str] = option([], help="what is searched, entries of `key: [..]` as above")
    trials: int = option(20, least=1, help="runs at most; a grid ends when it is done")
    sampler: Literal["tpe", "random", "grid"] = option(
        "tpe", help="tpe: learns from earlier trials (Bayesian); grid: all combinations of choices"
    )
    pruning: Literal["median", "none"] = option(
        "median", help="stop trials that are worse than the median at the same evaluation"
    )
    startup: int | None = option(
        None, least=1, help="trials before any is pruned and tpe learns; default: a third, 2 to 10"
    )

    def check(self) -> None:
        super().check()
        self.searched()
        if self.folds or self.seeds:
            raise UserError("folds and seeds: not in a search")
        if self.fsdp or self.deepspeed:
            raise UserError("fsdp and deepspeed: not in a search")

    def searched(self) -> dict[str, list[Any]]:
        """The space: of each key its choices, or [lowest, highest, "log" or "linear"].

        Raises: UserError for what is no setting, cannot be searched, or has no valid value.
        """
        found: dict[str, list[Any]] = {}
        for name, values in map(_entry, self.space):
            if name in found:
                raise UserError(f"space: {name} is there twice")
            found[name] = _typed(name, values)
            if self.sampler == "grid" and is_range(found[name]):
                raise UserError(f"space: a grid needs choices, and {name} is a range")
            for value in found[name][:2] if is_range(found[name]) else found[name]:
                self.train_config(**{name: value})  # its bounds
        return found

    def train_config(self, **chosen: Any) -> TrainConfig:
        """What `fastft train` would be asked for, with these settings over it."""
        own = {item.name: getattr(self, item.name) for item in fields(TrainConfig)}
        return TrainConfig(**own | {"resume": False, "dry_run": False} | chosen)


@dataclass(frozen=True)
class SearchResult:
    """best: the settings of the best trial, as best.yaml has them; model: what it trained."""

    folder: Path
    best: TrainConfig
    score: float
    model: Path
    metrics: dict[str, Any]


def search(config: SearchConfig) -> SearchResult | None:
    """Trains a run for every trial, prints a table of them and fills the folder config.output.

    Maximised is the validation metric that chooses a task's best checkpoint (of lm and sft the
    loss, minimised). There: study.journal (optuna's, for --resume and its own tools), best.yaml
    (settings for `fastft train`), trials/ (a run folder each, of which the best keeps its model),
    history.png, importance.png, metrics.json. Trials are drawn by seed and number, so a search that
    was interrupted goes on with --resume as it would have. With dry_run nothing is trained or
    written, and nothing returned.
    Raises: UserError; KeyboardInterrupt after Ctrl-C, to be resumed.
    """
    need("optuna", "search")
    import torch

    from fastft.finetune import dry_run, examples, run_folder, studying

    space = config.searched()
    if not space:
        raise UserError("space: nothing to search; give a key a list of values")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not config.dry_run:
        run_folder.check(config)
    rows = examples.read(config.train_config())
    if "validation" not in rows:
        raise UserError("validation: trials are compared by validation data, and there is none")
    if config.dry_run:
        print(table.text([["searched", ""], *([n, str(v)] for n, v in space.items())]) + "\n")
        dry_run.show(config.train_config(), rows)
        return None
    folder = run_folder.start(config, examples.files(config))
    study = studying.study(config, folder)
    studying.run(study, config, space, folder)
    return _finish(study, config, folder)


def _finish(study: Any, config: SearchConfig, folder: RunFolder) -> SearchResult:
    from fastft.finetune import plots, studying, tasks

    trials = [studying.line(trial) for trial in studying.finished(study)]
    if all(trial["state"] != "complete" for trial in trials):
        reasons = {trial["reason"] for trial in trials if "reason" in trial}
        raise UserError(f"no trial came to its end: {'; '.join(sorted(reasons))}")
    best = study.best_trial
    metric = tasks.of(config.task).BEST
    weights = studying.importance(study)
    metrics = {
        "task": config.task,
        "metric": metric,
        "best": {"trial": best.number, "score": best.value, **best.params},
        "importance": weights,
        "trials": trials,
    }
    plots.history(trials, metric, studying.maximised(config), folder.path / "history.png")
    if weights:
        plots.importance(weights, folder.path / "importance.png")
    folder.write_json("metrics.json", metrics)
    print(summary(metrics, folder))
    model = studying.trial_folder(folder, best).model / (config.adapter_name or "")
    return SearchResult(
        folder.path, studying.settings(config, folder, best), best.value, model, metrics
    )


def summary(metrics: dict[str, Any], folder: RunFolder) -> str:
    """The final table."""
    keys = list(metrics["trials"][0]["settings"]) if metrics["trials"] else []
    rows = [["trial", "", metrics["metric"], *keys]]
    for trial in metrics["trials"]:
        settings = [trial["settings"].get(key, "") for key in keys]
        score = "" if trial["score"] is None else trial["score"]
        rows.append([trial["trial"], trial["state"], score, *settings])
    best = metrics["best"]
    return "\n".join(
        [
            table.text(rows),
            f"best: trial {best['trial']}, {metrics['metric']} {best['score']:.4g}",
            f"its settings: fastft train {folder.path / 'best.yaml'} --output ...",
        ]
    )


def is_range(values: list[Any]) -> bool:
    return len(values) == 3 and values[2] in RANGES and not isinstance(values[0], str)


def _entry(text: str) -> tuple[str, list[Any]]:
    import yaml

    try:
        held = yaml.safe_load(text)
    except yaml.YAMLError:
        held = None
    if not isinstance(held, dict) or len(held) != 1:
        raise UserError(f"space: expected `key: [value, ...]`, got {text!r}")
    ((name, values),) = held.items()
    if not isinstance(values, list) or any(isinstance(v, list | dict) for v in values):
        raise UserError(f"space: {name}: expected a list of values, got {values!r}")
    return str(name).replace("-", "_"), values


def _typed(name: str, values: list[Any]) -> list[Any]:
    """The values of an entry in the type of the setting, a range's last word as it is."""
    hints = get_type_hints(TrainConfig)
    if name not in hints:
        raise UserError(f"space: {name}: no such setting of fastft train")
    kind = next(one for one in alternatives(hints[name]) if one is not type(None))
    if name in _FIXED or get_origin(kind) is list:
        raise UserError(f"space: {name} is the same in all trials")
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])
    way = values[-1] if kind in (int, float) and values and values[-1] in RANGES else None
    plain = values if way is None else values[:-1]
    try:
        typed = [_one(kind, value) for value in plain]
    except ValueError:
        raise UserError(f"space: {name}: expected {kind.__name__}s, got {plain}") from None
    if way is None:
        if len(set(typed)) < max(2, len(typed)):
            raise UserError(f"space: {name}: expected at least two different values, got {plain}")
        return typed
    if len(typed) != 2 or not typed[0] < typed[1] or (way == "log" and typed[0] <= 0):
        least = "above 0, " if way == "log" else ""
        raise UserError(f"space: {name}: expected [lowest, highest, {way}], {least}got {values}")
    return [*typed, way]


def _one(kind: type, value: Any) -> Any:
    # YAML reads 1e-5, which has no point, as text.
    if kind is bool or isinstance(value, bool):
        if isinstance(value, bool) is (kind is bool):
            return value
        raise ValueError
    typed = kind(value)
    if kind is int and float(value) != typed or kind is float and not math.isfinite(typed):
        raise ValueError
    return typed
