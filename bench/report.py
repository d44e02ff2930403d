"""`python -m bench.report [FILE …]`: writes what the benches found into Markdown, between markers.

    <!-- bench:table cpu-vnni
    greedy, 1 row*
    -->
    (what stands here is replaced)
    <!-- /bench -->

names a kind of machine (bench/results/ratios-<machine>.json) and the works to show, a pattern a
line, in their order. `table` is their ratios and memory. `speed` is a plot of time against eager,
`memory` one of memory over what the works vary; both are SVG files in bench/results. Without
FILE: README.md and docs/*.md. The numbers are those of the file, and none is written by hand.
"""

import io
import os
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from bench.gpu.results import KEPT, ROOT
from bench.ratios import Ratios, Row, parse, path_of

REGION = re.compile(
    r"(?P<begin><!-- bench:(?P<kind>\S+) (?P<machine>\S+)\n(?P<patterns>.*?)-->\n)"
    r"(?P<body>.*?)(?P<end><!-- /bench -->)",
    re.DOTALL,
)
COLOURS = {"fastft": "tab:green", "eager": "tab:gray"}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def rewritten(text: str, page: Path, folder: Path = KEPT, plots: bool = False) -> str:
    """The page with its regions as the ratios in `folder` say; plots: draws them too."""

    def region(found: re.Match) -> str:
        kind, machine = found["kind"], found["machine"]
        if kind not in ("table", *PLOTS):
            raise ValueError(f"{page.name}: bench:{kind} is none of table, {', '.join(PLOTS)}")
        if "<!-- bench:" in found["body"]:
            raise ValueError(f"{page.name}: bench:{kind} {machine} has no end <!-- /bench -->")
        ratios = parse(path_of(machine, folder).read_text())
        patterns = [line.strip() for line in found["patterns"].splitlines() if line.strip()]
        rows = chosen(ratios, patterns, f"{page.name}: bench:{kind} {machine}")
        if kind == "table":
            body = table(rows)
        else:
            path = folder / f"{kind}-{machine}.svg"
            if plots:
                path.write_text(svg(PLOTS[kind], rows))
            body = f"![{ALT[kind]}]({os.path.relpath(path, page.parent)})"
        return f"{found['begin']}\n{body}\n\n{caption(rows, ratios)}\n\n{found['end']}"

    if (begins := text.count("<!-- bench:")) != (ends := text.count("<!-- /bench -->")):
        raise ValueError(f"{page.name}: {begins} regions begin and {ends} end")
    result, count = REGION.subn(region, text)
    if count != begins:
        raise ValueError(f"{page.name}: of {begins} regions {count} are written as bench/report.py")
    return result


def chosen(ratios: Ratios, patterns: list[str], where: str) -> list[Row]:
    rows = []
    for pattern in patterns:
        own = [row for row in ratios.rows if fnmatchcase(row.work, pattern) and row not in rows]
        if not own:
            raise ValueError(f"{where}: no work is called {pattern!r}, or another pattern has it")
        rows += own
    return rows


def table(rows: list[Row]) -> str:
    """A line a work: time of eager and of others over fastft's, and both sides' extra memory."""
    works: dict[str, list[Row]] = {}
    for row in rows:
        works.setdefault(row.work, []).append(row)
    lines = []
    for work, own in works.items():
        eager = [row for row in own if row.against == "eager"]
        others = [
            f"{row.against} {ratio(row)}" + (f" ({row.memory[0]:,.0f} MiB)" if row.memory else "")
            for row in own
            if row.against != "eager"
        ]
        memory = [row.memory for row in eager if row.memory is not None]
        lines.append(
            (
                work,
                ratio(eager[0]) if eager else "",
                "; ".join(others),
                "{:,.0f} and {:,.0f} MiB".format(*memory[0]) if memory else "",
            )
        )
    heads = (
        "work",
        "time, eager / fastft",
        "time, others / fastft",
        "peak extra memory, eager and fastft",
    )
    shown = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    return "\n".join(
        "| " + " | ".join(line[i] for i in shown) + " |"
        for line in (heads, ("---",) * len(heads), *lines)
    )


def ratio(row: Row) -> str:
    return f"{row.ratio:.2f}" if row.ratio < 2 else f"{row.ratio:.1f}"


def caption(rows: list[Row], ratios: Ratios) -> str:
    """Of which machine, versions and day the rows are."""
    told = []
    for run in dict.fromkeys(row.run for row in rows):
        own = ratios.runs[run]
        names = ["torch", "transformers"]
        if any(row.run == run and row.against.startswith("llama.cpp") for row in rows):
            names.append("llama-cpp-python")
        versions = [f"{name} {own['versions'][name]}" for name in names if name in own["versions"]]
        when = own["date"] + (f" at {own['commit']}" if "commit" in own else "")
        parts = [f"{own['processor']}, {own['threads']} threads", ", ".join(versions), when]
        told.append("; ".join([*parts, *filter(None, [own.get("note")])]))
    return "<sub>" + ".<br>\n".join(told) + ".</sub>"


def speed(figure, rows: list[Row]) -> None:
    """A bar a work: how often fastft does it while eager does it once."""
    rows = [row for row in rows if row.against == "eager"][::-1]
    figure.set_size_inches(9, 1 + 0.3 * len(rows))
    axes = figure.subplots()
    bars = axes.barh([row.work for row in rows], [row.ratio for row in rows], color="tab:green")
    axes.bar_label(bars, [ratio(row) for row in rows], padding=3)
    axes.axvline(1, color="tab:gray")
    axes.set_xlabel("time, eager / fastft (1: as fast as eager)")
    axes.margins(x=0.1, y=0.01)


def memory(figure, rows: list[Row]) -> None:
    """A panel for each thing that varies: MiB of every side over it."""
    panels: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.at is None or row.memory is None:
            raise ValueError(f"{row.work!r} is no point of a plot of memory")
        title, axis, place = row.at
        sides = panels.setdefault((title, axis), {})
        for side, size in zip((row.against, "fastft"), row.memory, strict=True):
            sides.setdefault(side, {})[place] = size
    figure.set_size_inches(5 * len(panels), 3.8)
    for axes, ((title, axis), sides) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for side, points in sides.items():
            places = sorted(points)
            axes.plot(
                places, [points[x] for x in places], "o-", label=side, color=COLOURS.get(side)
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{x:,}" for x in places])
        axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(axis)
        axes.set_ylabel("peak extra memory, MiB")
        axes.legend()


PLOTS: dict[str, Callable] = {"speed": speed, "memory": memory}
ALT = {"speed": "time of eager over fastft's, by work", "memory": "peak extra memory of both sides"}


def svg(draw: Callable, rows: list[Row]) -> str:
    """The same bytes for the same rows, so that only changed numbers show in a diff."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fastft", "svg.fonttype": "none"}):
        figure = Figure(layout="constrained")
        draw(figure, rows)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


def main(files: list[str]) -> int:
    for page in [Path(name).resolve() for name in files] or pages():
        text = page.read_text()
        new = rewritten(text, page, plots=True)
        if new != text:
            page.write_text(new)
            print(f"rewrote the numbers of {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
