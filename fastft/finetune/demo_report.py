"""The demo's table and picture, from the values of metrics.json."""

from pathlib import Path
from typing import Any


def text(metrics: dict[str, Any], output: Path) -> str:
    """The table, both answers, and where the files are."""
    found, memory = metrics["summary"], metrics["memory"]
    speed, floor = found["tokens_per_second"], found["floor_tokens_per_second"]
    curves = metrics["curves"]
    rows = [
        ("", "eager", "fastft", ""),
        _row("tokens/s", speed, "{:.0f}", f"{found['ratio']:.2f}x (median of steps)"),
        (
            "share of the floor",
            *(f"{speed[s] / floor:.0%}" for s in speed),
            f"{floor:.0f} tokens/s",
        ),
        _memory("peak memory", memory, lambda m: m["peak"]),
        _memory("  of it training", memory, lambda m: m["peak"] - m["before_training"]),
        _row("first loss", {s: c["losses"][0] for s, c in curves.items()}, "{:.4f}", ""),
        _row(
            "last loss",
            {s: c["losses"][-1] for s, c in curves.items()},
            "{:.4f}",
            f"largest difference {found['loss_difference']:.1e}",
        ),
    ]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(4)]
    lines = ["".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", _conditions(metrics), "", *_answers(metrics["answers"]), ""]
    lines.append(f"{output}/: curves.png, metrics.json, adapter; {metrics['seconds']:.0f} s in all")
    return "\n" + "\n".join(lines)


def _row(name: str, values: dict[str, Any], form: str, note: str) -> tuple[Any, ...]:
    return (name, *(form.format(values[side]) for side in ("eager", "patched")), note)


def _memory(name: str, memory: dict[str, Any], of: Any) -> tuple[Any, ...]:
    values = {side: of(found) / 2**20 for side, found in memory.items()}
    return _row(name, values, "{:.0f} MiB", f"{values['eager'] / max(values['patched'], 1):.2f}x")


def _conditions(metrics: dict[str, Any]) -> str:
    tokens, places, labelled = (sum(metrics[key]) for key in ("tokens", "places", "labelled"))
    rates = metrics["rates"]
    return (
        f"{len(metrics['tokens'])} steps, {tokens} tokens, {labelled} of them labelled, padded to "
        f"{places}; torch {metrics['torch']}, {metrics['machine']}.\n"
        f"The floor counts the matrix products of real tokens at this machine's "
        f"{rates['operations'] / 1e9:.0f} GFLOP/s in float32, and its weights at "
        f"{rates['bytes'] / 1e9:.0f} GB/s."
    )


def _answers(answers: dict[str, Any]) -> list[str]:
    lines = [f"asked (held out): {answers['question']}"]
    for when in ("before", "after"):
        found = answers[when]
        lines.append(f"{when} (held-out loss {found['loss']:.4f}): {found['text'].strip()}")
    return lines


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Both loss curves, and the seconds of each step over the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, times = figure.subplots(1, 2)
    steps = range(1, len(metrics["tokens"]) + 1)
    for side, style in (("eager", "o-"), ("patched", "x--")):
        curve = metrics["curves"][side]
        label = "fastft" if side == "patched" else side
        losses.plot(steps, curve["losses"], style, label=label)
        times.plot(steps, curve["seconds"], style, label=label)
    times.plot(steps, metrics["floor_seconds"], ":", color="gray", label="floor")
    times.set_ylim(bottom=0)
    for axes, name in ((losses, "loss"), (times, "seconds per step")):
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(name)
        axes.legend()
    figure.savefig(path, dpi=120)
