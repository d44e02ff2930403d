"""What became of a data set: metrics.json, the table of it, and a picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import fastft
from fastft.finetune.run_folder import sha256

ORDER = ("train", "validation", "test")
QUANTILES = {"median": 0.5, "95%": 0.95, "longest": 1.0}
BARS = 20  # labels and reasons shown, the most frequent


def metrics(
    config: Any, source: Any, kept: Any, splits: Sequence[str], dropped: Counter[str]
) -> dict[str, Any]:
    """What metrics.json says: counts, and what is needed to make the same data again.

    config, source, kept: of prepare and sieve; splits: of each kept row.
    """
    return {
        "format": {"source": source.format, "target": config.target_format or source.format},
        "rows": len(kept) + dropped.total(),
        "kept": len(kept),
        "dropped": dict(dropped.most_common()),
        "splits": {name: _split(name, kept, splits) for name in ORDER if name in splits},
        "settings": asdict(config),
        "files": {str(path): sha256(path) for path in source.files},
        "versions": {"fastft": fastft.__version__}
        | {name: version(name) for name in ("ftfy", "datasketch")},
    }


def _split(name: str, kept: Any, splits: Sequence[str]) -> dict[str, Any]:
    rows = [row for row, split in enumerate(splits) if split == name]
    counts = Counter(label for row in rows for label in kept.labels[row])
    lengths = np.array([kept.lengths[row] for row in rows])
    characters = {what: int(np.quantile(lengths, q)) for what, q in QUANTILES.items()}
    labels = {str(label): count for label, count in counts.most_common()}
    return {"rows": len(rows), "labels": labels, "characters": characters}


def text(metrics: dict[str, Any], output: Path) -> str:
    """The table: rows dropped by reason, then rows, lengths and labels of every split."""
    read, kept, formats = metrics["rows"], metrics["kept"], metrics["format"]
    lines = [f"{read} rows of {formats['source']} read, {kept} kept as {formats['target']}"]
    counts = metrics["dropped"]
    lines += [f"  {count:>9} dropped: {reason}" for reason, count in counts.items()]
    splits = metrics["splits"]
    labels = list(dict.fromkeys(label for held in splits.values() for label in held["labels"]))
    rows = [("", *splits), ("rows", *(str(held["rows"]) for held in splits.values()))]
    for what in QUANTILES:
        lengths = (str(held["characters"][what]) for held in splits.values())
        rows.append((f"characters, {what}", *lengths))
    for label in labels[:BARS]:
        shares = ((held["labels"].get(label, 0), held["rows"]) for held in splits.values())
        rows.append((f"label {_short(label, 40)}", *(f"{n} ({n / of:.1%})" for n, of in shares)))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines += [""]
    for name, *values in rows:
        cells = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append(name.ljust(widths[0]) + "".join(cells))
    if len(labels) > BARS:
        lines.append(f"and {len(labels) - BARS} labels more, in metrics.json")
    lines += ["", f"{output}/: {', '.join(f'{n}.jsonl' for n in splits)}, dropped.jsonl (each row"]
    lines[-1] += " dropped, and why), metrics.json, overview.png"
    return "\n".join(lines)


def _short(label: str, most: int) -> str:
    return " ".join(label.split())[:most]


def plot(metrics: dict[str, Any], lengths: Any, splits: Sequence[str], path: Path) -> None:
    """Lengths of the rows, the balance of the labels, and why rows were dropped, side by side."""
    from matplotlib.figure import Figure

    held = metrics["splits"]
    labels = list(dict.fromkeys(label for one in held.values() for label in one["labels"]))[:BARS]
    panels = 1 + bool(labels) + bool(metrics["dropped"])
    figure = Figure(figsize=(4.5 * panels, 3.5), layout="constrained")
    lengths_axes, *others = figure.subplots(1, panels, squeeze=False)[0]

    values, of = np.array(lengths), np.array(splits)
    edges = np.unique(np.geomspace(values.min(), values.max() + 1, 40).astype(int))
    lengths_axes.hist([values[of == name] for name in held], edges, stacked=True, label=list(held))
    lengths_axes.set(xscale="log", xlabel="characters", ylabel="rows")
    lengths_axes.legend()
    if labels:
        axes = others.pop(0)
        for number, one in enumerate(held.values()):
            shares = [one["labels"].get(label, 0) / one["rows"] for label in labels]
            places = np.arange(len(labels)) + (number - (len(held) - 1) / 2) * 0.8 / len(held)
            axes.bar(places, shares, 0.8 / len(held))  # in the colors of the lengths
        names = [_short(label, 20) for label in labels]
        axes.set_xticks(range(len(labels)), names, parse_math=False)
        axes.tick_params("x", rotation=30 if len(labels) > 6 else 0)
        axes.set_ylabel("share of the split's rows with a label")
    if metrics["dropped"]:
        axes = others.pop(0)
        reasons = list(metrics["dropped"].items())[:BARS]
        axes.barh([reason[:40] for reason, _ in reasons], [count for _, count in reasons])
        axes.invert_yaxis()
        axes.set_xlabel("rows dropped")
    figure.savefig(path, dpi=120)
