"""Several runs of one configuration, over folds or seeds: their mean and deviation."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft.finetune import examples, run_folder, running, table, trainer
from fastft.finetune.train import RunResult, TrainConfig


def run(config: TrainConfig, rows: dict[str, Any]) -> RunResult:
    """A run in a folder of its own for every fold or seed, and their summary above them.

    With resume, runs that are finished are read, and the others go on or begin.
    Raises: as running.run.
    """
    planned = _planned(config, rows)
    # What is wrong with data or model is told before.
    first: running.Prepared | None = running.prepare(*planned[0])
    folder = run_folder.start(config, examples.files(config))
    results, main = [], run_folder.processes().is_main_process
    for index, (own, held) in enumerate(planned):
        done = run_folder.RunFolder(own.output)
        if done.finished:
            results.append(RunResult(done.path, done.read_metrics(), done.model))
            continue
        own = replace(own, resume=config.resume and done.record.is_file())
        prepared = first if first and index == 0 else running.prepare(own, held)
        prepared.config = replace(prepared.config, resume=own.resume)
        started = run_folder.start(own, examples.files(config))
        if main:
            print(f"{Path(own.output).name}, {index + 1} of {len(planned)}")
        results.append(running.run(prepared, started))
        del prepared
        first = None
    metrics = {
        "runs": {result.folder.name: result.metrics for result in results},
        **{split: spread(results, split) for split in ("validation", "test")},
    }
    metrics = {name: value for name, value in metrics.items() if value}
    if main:
        folder.write_json("metrics.json", metrics)
        print(summary(metrics))
    run_folder.processes().wait_for_everyone()
    return RunResult(folder.path, metrics, None, results)


def spread(results: list[RunResult], split: str) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of every number that all runs measured on split."""
    measured = [trainer.numbers(result.metrics.get(split, {})) for result in results]
    found = {}
    for name in measured[0]:
        if all(name in one for one in measured):
            values = [one[name] for one in measured]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    return found


def summary(metrics: dict[str, Any]) -> str:
    lines = []
    for split in ("validation", "test"):
        if split in metrics:
            rows = [[split, "mean", "deviation"]]
            rows += [[name, v["mean"], v["deviation"]] for name, v in metrics[split].items()]
            lines += [f"over {len(metrics['runs'])} runs", table.text(rows)]
    return "\n".join(lines)


def _planned(config: TrainConfig, rows: dict[str, Any]) -> list[tuple[TrainConfig, dict[str, Any]]]:
    output = Path(config.output)
    if config.folds:
        parts = examples.folds(rows, config)
        return [
            (replace(config, folds=0, output=str(output / f"fold-{i}")), part)
            for i, part in enumerate(parts, 1)
        ]
    return [
        (replace(config, seeds=None, seed=seed, output=str(output / f"seed-{seed}")), rows)
        for seed in config.seeds or ()
    ]
