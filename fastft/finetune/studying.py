"""A search's study, in optuna: which trial is next, how it is trained, and when it is given up."""

import itertools
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from transformers import TrainerCallback

from fastft.finetune import UserError, assets, examples, run_folder, running, tasks
from fastft.finetune.run_folder import RunFolder
from fastft.finetune.search import SearchConfig, is_range
from fastft.finetune.train import TrainConfig

_REASON = "reason"  # of a trial that failed: not one that was interrupted


def study(config: SearchConfig, folder: RunFolder) -> optuna.Study:
    """The study in a search's folder, where trials that were interrupted do not count."""
    with _quiet(), run_folder.readable(str(folder.path)):
        _drop_half_a_line(folder.path / "study.journal")
        found = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder.path / "study.journal"))),
            study_name="search",
            direction="maximize" if maximised(config) else "minimize",
            pruner=_pruner(config),
            load_if_exists=True,
        )
        for trial in found.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:  # its process was killed
                found.tell(trial.number, state=TrialState.FAIL)
        if config.sampler == "grid":
            _queue_grid(found, config)
    return found


def _drop_half_a_line(journal: Path) -> None:
    # optuna passes over it while it is the last, appends to it, and then cannot read the study.
    if journal.is_file():
        with open(journal, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _queue_grid(study: optuna.Study, config: SearchConfig) -> None:
    # Not optuna's GridSampler: it takes a combination that was interrupted for done.
    space = config.searched()
    grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    random.Random(config.seed).shuffle(grid)  # fewer trials than combinations see all of it
    seen = [
        t.system_attrs.get("fixed_params") for t in study.get_trials() if not _is_interrupted(t)
    ]
    for combination in grid:
        if combination not in seen:
            study.enqueue_trial(combination)


def run(
    study: optuna.Study, config: SearchConfig, space: dict[str, Any], folder: RunFolder
) -> None:
    """Trains trials until there are config.trials, or the grid is done.

    Raises: KeyboardInterrupt after Ctrl-C.
    """
    _settle(study, config, folder)
    total = config.trials
    if config.sampler == "grid":
        total = min(total, math.prod(map(len, space.values())))
    while (number := len(finished(study))) < total:
        study.sampler = _sampler(config, number)
        with _quiet():
            trial = study.ask()
            chosen = {name: _suggest(trial, name, values) for name, values in space.items()}
        print(f"trial {trial.number}, {number + 1} of {total}: {_shown(chosen)}", flush=True)
        try:
            output = str(trial_folder(folder, trial).path)
            score = _train(trial, config.train_config(output=output, **chosen))
        except optuna.TrialPruned:
            print(f"trial {trial.number}: pruned")
            _end(study, trial, state=TrialState.PRUNED)
        except UserError as error:
            assets.say(f"trial {trial.number}: {error}")
            trial.set_user_attr(_REASON, str(error))
            _end(study, trial, state=TrialState.FAIL)
        except KeyboardInterrupt:
            _end(study, trial, state=TrialState.FAIL)
            raise
        else:
            _end(study, trial, values=score)
        _settle(study, config, folder)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that need no repeating, in their order."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state.is_finished() and not _is_interrupted(t)]


def maximised(config: Any) -> bool:
    out: bool = tasks.of(config.task).BEST != "loss"
    return out


def trial_folder(folder: RunFolder, trial: Any) -> RunFolder:
    return RunFolder(folder.path / "trials" / str(trial.number))


def settings(config: SearchConfig, folder: RunFolder, trial: Any) -> TrainConfig:
    """What `fastft train` would be asked for, to do again in a new folder what trial did."""
    return config.train_config(**trial.params, output=f"{folder.path}-best")


def line(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as metrics.json and the table have it."""
    found = {"trial": trial.number, "state": trial.state.name.lower(), "score": trial.value}
    if _REASON in trial.user_attrs:
        found["reason"] = trial.user_attrs[_REASON]
    return found | {"settings": trial.params, "evaluations": trial.intermediate_values}


def importance(study: optuna.Study) -> dict[str, float]:
    """The share of each setting in what made trials good or bad (PED-ANOVA, arXiv 2304.10255).

    Empty where too few trials, or all with one score, tell nothing.
    """
    values = {t.value for t in study.get_trials(states=[TrialState.COMPLETE], deepcopy=False)}
    if len(values) < 2:
        return {}
    with _quiet():
        found = optuna.importance.get_param_importances(study)
    return {name: float(value) for name, value in found.items()}


class _Watch(TrainerCallback):
    """Tells the study what each evaluation found, and ends a trial that it gives up."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric, self.count = trial, metric, 0

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: Any = None,
        **more: Any,
    ) -> None:
        # By its number: steps of trials with other batch sizes are not the same point.
        self.count += 1
        self.trial.report(metrics[self.metric], self.count)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def _train(trial: optuna.Trial, config: Any) -> float:
    metric = tasks.of(config.task).BEST
    prepared = running.prepare(config, examples.read(config))
    started = run_folder.start(config, examples.files(config))
    watch = _Watch(trial, f"eval_{metric}")
    score = running.run(prepared, started, [watch]).metrics["validation"][metric]
    if not math.isfinite(score):
        raise UserError(f"the validation {metric} is {score}")
    out: float = score
    return out


def _end(study: optuna.Study, trial: optuna.Trial, **told: Any) -> None:
    with _quiet():
        study.tell(trial, **told)


def _settle(study: optuna.Study, config: SearchConfig, folder: RunFolder) -> None:
    """Leaves of the trials told so far what is kept; again after a kill, which may come before."""
    trials = study.get_trials(deepcopy=False)
    best = study.best_trial if any(t.state == TrialState.COMPLETE for t in trials) else None
    for trial in trials:
        own = trial_folder(folder, trial)
        shutil.rmtree(own.checkpoints, ignore_errors=True)
        if best is None or trial.number != best.number:
            shutil.rmtree(own.model, ignore_errors=True)
    if best is not None:
        folder.write("best.yaml", run_folder.yaml_of(settings(config, folder, best)))


def _shown(chosen: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in chosen.items()
    )


def _is_interrupted(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and _REASON not in trial.user_attrs


def _startup(config: SearchConfig) -> int:
    return config.startup or min(10, max(2, config.trials // 3))


def _pruner(config: SearchConfig) -> optuna.pruners.BasePruner:
    if config.pruning == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=_startup(config))


def _sampler(config: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    # A sampler's own state is not in the study: seeded anew, trials after an interruption would be
    # those of the beginning again. So each has a seed of its own.
    seed = (1_000_003 * config.seed + number) % 2**32
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=_startup(config), seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's trials wait in the study


def _suggest(trial: optuna.Trial, name: str, values: list[Any]) -> Any:
    if not is_range(values):
        return trial.suggest_categorical(name, values)
    low, high, way = values
    suggest = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return suggest(name, low, high, log=way == "log")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's own lines, which are ours in other words."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
