"""bench/results/ratios-<machine>.json: what `make bench` found, as ratios, a row a line.

A row is one work against one side: the median of the side's time over fastft's, what is aimed at,
and the extra memory of both. It names its run: versions, threads, processor, commit. There are no
times in it, for those are of one machine and day. A run replaces the rows that it measured, and
no other; the rows of a work that was renamed are for you to delete.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.results import KEPT, ROOT, describe
from fastft import library


@dataclass(frozen=True)
class Row:
    """ratio: time of the side over fastft's. memory: MiB of the side and of fastft.

    at: title, axis and place, of a work that is one point of a plot.
    """

    work: str
    against: str
    ratio: float
    aim: float | None = None
    memory: tuple[float, float] | None = None
    at: tuple[str, str, int] | None = None
    run: str = ""


@dataclass
class Ratios:
    """One file: its rows, and the runs they are of."""

    rows: list[Row]
    runs: dict[str, dict]

    def add(self, rows: Iterable[Row], name: str, run: dict) -> None:
        found = {(row.work, row.against): row for row in self.rows}
        found |= {(row.work, row.against): dataclasses.replace(row, run=name) for row in rows}
        self.rows = list(found.values())
        used = {row.run for row in self.rows}
        self.runs = {key: told for key, told in (self.runs | {name: run}).items() if key in used}

    def text(self) -> str:
        """JSON that shows in a diff which rows have changed."""
        fields = [
            {key: value for key, value in dataclasses.asdict(row).items() if value is not None}
            for row in self.rows
        ]
        rows = ",\n".join("  " + json.dumps(row) for row in fields)
        runs = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(run)}" for key, run in self.runs.items()
        )
        return f'{{\n "runs": {{\n{runs}\n }},\n "rows": [\n{rows}\n ]\n}}\n'


def parse(text: str) -> Ratios:
    found = json.loads(text)
    pairs = ("memory", "at")
    rows = [
        Row(**{key: tuple(v) if key in pairs else v for key, v in row.items()})
        for row in found["rows"]
    ]
    return Ratios(rows, found["runs"])


def path_of(machine: str, folder: Path = KEPT) -> Path:
    return folder / f"ratios-{machine}.json"


def processor() -> str:
    """The kind of processor, which names no single machine."""
    with open("/proc/cpuinfo") as info:
        lines = (line.split(":", 1) for line in info if ":" in line)
        fields = {name.strip(): value.strip() for name, value in lines}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"


def this_run(threads: int) -> tuple[str, dict]:
    """The name and the description of what is measured here and now."""
    sources = ("*.py", "csrc", "kernels")
    commit = _told("git", "rev-parse", "--short=10", "HEAD")
    if commit and _told("git", "status", "--porcelain", "-uno", "--", *sources):
        commit += " and changes"
    run = describe("cpu", toy=False, commit=commit)
    name = f"{run.pop('id')}, {threads} threads"
    del run["machine"]
    try:
        run["versions"]["llama-cpp-python"] = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        pass
    return name, run | {"processor": processor(), "threads": threads}


def _told(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def machine(folder: Path = KEPT) -> str:
    """The name under which this kind of processor has its ratios; of a new one cpu-<its best set>.

    Ratios of two kinds in one file would be compared with each other, so ValueError where that name
    is taken.
    """
    own = processor()
    for path in sorted(folder.glob("ratios-*.json")):
        if any(run["processor"] == own for run in parse(path.read_text()).runs.values()):
            return path.stem.removeprefix("ratios-")
    best = library.extension.build_info()["instruction_set"] if library.extension else "eager"
    name = f"cpu-{best.removeprefix('avx512') or best}"
    if path_of(name, folder).exists():
        raise ValueError(f"{path_of(name, folder)} is not of this processor ({own}): name another")
    return name


def record(rows: Iterable[Row], threads: int, path: Path) -> None:
    """Adds the rows to the file, as of this run."""
    kept = parse(path.read_text()) if path.exists() else Ratios([], {})
    kept.add(rows, *this_run(threads))
    path.write_text(kept.text())
