"""PNG plots of training and evaluation, by matplotlib's objects: no global state is touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.finetune import UserError, need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Trainer's evaluation logs, what is no metric.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "loss", "num_tokens")


def curves(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses, learning rate and, where there are any, the metrics of each evaluation, over steps.

    log_history: as Trainer keeps it (`trainer.state.log_history`).
    """
    metrics = sorted(
        name
        for name in {key for entry in log_history for key in entry}
        if name.startswith("eval_")
        and not name.endswith(_TIMES)
        and any(isinstance(entry.get(name), int | float) for entry in log_history)
    )
    figure = _figure(width=4.5 * (3 if metrics else 2), height=3.5)
    panels = figure.subplots(1, 3 if metrics else 2)
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        _line(panels[0], log_history, name, label, style)
    _line(panels[1], log_history, "learning_rate", "learning rate", "-")
    for name in metrics:
        _line(panels[2], log_history, name, name.removeprefix("eval_"), "o-")
    for axes, name in zip(panels, ("loss", "learning rate", "validation"), strict=False):
        _steps(axes, "step", name)
    _save(figure, path)


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Counts of true classes (rows) predicted as which (columns), coloured by share of the row."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = _figure(width=2.5 + 0.6 * len(names), height=2 + 0.6 * len(names))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _names(axes, names, names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 20:  # more would lie over each other
        _write(axes, shares, [[str(count) for count in row] for row in counts.tolist()])
    figure.colorbar(image, ax=axes, label="share of the true class")
    _save(figure, path)


def forgetting(
    matrix: Sequence[Sequence[float]],
    names: Sequence[str],
    path: Path,
    models: Sequence[str] | None = None,
) -> None:
    """What a model still knows: matrix[i][j] is its score on data j after training on data i.

    names: of the data sets, in the order of training; NaN where there is no score. Shown as
    numbers, and for each data set as a line over the trainings. models: names of the rows, where
    they are not trained on the data one after another.
    """
    scores = np.asarray(matrix, dtype=np.float64)
    figure = _figure(width=5 + 1.2 * len(names), height=2.5 + 0.5 * len(scores))
    table, lines = figure.subplots(1, 2)
    after = models or [f"after {name}" for name in names[: len(scores)]]
    image = table.imshow(scores, cmap="viridis")
    _names(table, names, after)
    texts = [[f"{x:.3f}" if np.isfinite(x) else "" for x in row] for row in scores]
    span = np.nanmax(scores) - np.nanmin(scores)
    _write(table, 1 - (scores - np.nanmin(scores)) / (span or 1), texts)
    figure.colorbar(image, ax=table, label="score")
    for j, name in enumerate(names):
        lines.plot(range(len(scores)), scores[:, j], "o-", label=f"on {_plain(name)}")
    lines.set_xticks(range(len(scores)), map(_plain, after), rotation=30, ha="right")
    lines.set_ylabel("score")
    lines.legend()
    _save(figure, path)


def history(trials: Sequence[Mapping[str, Any]], metric: str, maximise: bool, path: Path) -> None:
    """Scores of a search's trials, the best so far, and those that were given up.

    trials: {"trial": number, "score": number or None, "state": ...}, in order.
    """
    figure = _figure(width=7, height=3.5)
    axes = figure.subplots()
    done = [(trial["trial"], trial["score"]) for trial in trials if trial["state"] == "complete"]
    given_up = [trial["trial"] for trial in trials if trial["state"] != "complete"]
    numbers, scores = zip(*done, strict=True)
    best = (np.maximum if maximise else np.minimum).accumulate(scores)
    axes.plot(numbers, scores, "o", label="trial")
    axes.step(numbers, best, where="post", label="best so far")
    lowest = min(scores)
    if given_up:
        axes.plot(given_up, [lowest] * len(given_up), "x", color="gray", label="pruned or failed")
    _steps(axes, "trial", metric)
    _save(figure, path)


def importance(shares: Mapping[str, float], path: Path) -> None:
    """The share of each setting in how good a search's trials were."""
    figure = _figure(width=7, height=1.5 + 0.3 * len(shares))
    axes = figure.subplots()
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [shares[name] for name in names])
    axes.set_yticks(range(len(names)), map(_plain, names))
    axes.set_xlabel("importance")
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    need("matplotlib", "a plot")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _line(
    axes: "Axes", log_history: Sequence[Mapping[str, Any]], name: str, label: str, style: str
) -> None:
    points = [(entry.get("step", 0), entry[name]) for entry in log_history if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)


def _steps(axes: "Axes", below: str, beside: str) -> None:
    axes.set_xlabel(below)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)
    axes.set_ylabel(beside)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _names(axes: "Axes", columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), map(_plain, columns), rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), map(_plain, rows))


def _plain(name: str) -> str:
    """Text between two dollars would be taken for mathematics."""
    return name.replace("$", r"\$")


def _write(axes: "Axes", darkness: np.ndarray, texts: Sequence[Sequence[str]]) -> None:
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            colour = "white" if darkness[i, j] > 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour)


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
