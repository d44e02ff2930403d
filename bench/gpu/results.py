"""bench/results/<gpu>.json, written after every case, and the Markdown table made of it.

A case is there once it was recorded by the same run: the same sources, torch and machine. Results
of other sources stay until their case runs again, and say which commit they are of.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

from bench.gpu import peers
from bench.gpu.case import Report

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "bench" / "results"
SOURCES = ("setup.py", "fastft/**/*.py", "csrc/**/*.*", "kernels/**/*.*", "bench/gpu/*.py",
           "tests/truth.py", "tests/gpu/*.py")  # fmt: skip
HEADS = (
    "side",
    "ms",
    "ratio",
    "floor ms",
    "of floor",
    "tokens/s",
    "peak MiB",
    "host ms",
    "differs",
)


def folder_for(device: str, asked: str | None) -> Path:
    """Where results go. Only a GPU's may lie in bench/results."""
    folder = Path(asked).resolve() if asked else KEPT if device == "cuda" else ROOT / "build/gpu"
    if device != "cuda" and folder.is_relative_to(KEPT):
        raise ValueError(f"results: expected another folder than {KEPT} without a GPU")
    return folder


def fingerprint() -> str:
    """Of everything that decides a result; a commit alone would not tell of changes on top."""
    whole = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                whole.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:10]


def _told(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def describe(device: str, toy: bool, commit: str | None = None) -> dict:
    """The run: what is measured, and on what."""
    machine = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    commit = commit or _told("git", "describe", "--always", "--dirty", "--abbrev=10")
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", *peers.DISTRIBUTIONS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    if device == "cuda":
        versions["CUDA"] = torch.version.cuda
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = _told("nvidia-smi", *query) or "unknown"
    source = fingerprint()
    return {
        "id": f"{source} torch {torch.__version__}{' toy' if toy else ''}",
        "machine": machine + (" (toy sizes)" if toy else ""),
        "commit": commit or "unknown",
        "source": source,
        "date": date.today().isoformat(),
        "versions": versions,
    }


class Results:
    """The file of one machine. Every change is read, made and written at once."""

    def __init__(self, folder: Path, run: dict, invocation: str):
        self.run, self.invocation = run, invocation
        name = re.sub(r"[^a-z0-9]+", "-", run["machine"].lower()).strip("-")
        self.path = folder / f"{name}.json"

    def load(self) -> dict:
        if not self.path.exists():
            return {"machine": self.run["machine"], "runs": {}, "cases": {}, "running": None}
        return json.loads(self.path.read_text())

    def _write(self, found: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        used = {entry["run"] for entry in found["cases"].values()}
        found["runs"] = {key: run for key, run in found["runs"].items() if key in used}
        for path, text in (
            (self.path, json.dumps(found, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(found)),
        ):
            beside = path.with_name(path.name + ".new")
            beside.write_text(text)
            os.replace(beside, path)

    def begin(self, name: str | None) -> None:
        """Notes what is running, so that the death of the process is told of the right case."""
        self._write(self.load() | {"running": name})

    def running(self) -> str | None:
        return self.load()["running"]

    def record(self, name: str, status: str, report: Report, seconds: float, why: str = "") -> None:
        """Prints the case, then writes it: nothing is in the file that was not printed."""
        entry = {
            "run": self.run["id"], "invocation": self.invocation, "status": status,
            "seconds": round(seconds, 1), "why": why, **dataclasses.asdict(report),
        }  # fmt: skip
        print("\n".join(_lines(name, entry)), flush=True)
        found = self.load()
        found["cases"][name] = entry
        found["runs"][self.run["id"]] = self.run
        found["running"] = None
        self._write(found)

    def pending(self, names: list[str], fresh: bool = False) -> list[str]:
        """Cases still to run: new ones first, then those that failed in an earlier invocation."""
        cases, left, again = self.load()["cases"], [], []
        for name in names:
            entry = cases.get(name)
            if entry is None or entry["run"] != self.run["id"]:
                left.append(name)
            elif entry["invocation"] != self.invocation:
                if fresh:
                    left.append(name)
                elif entry["status"] == "failed":
                    again.append(name)
        return left + again

    def failed(self, names: list[str]) -> list[str]:
        """Of this run; what other sources did wrong is theirs."""
        cases, own = self.load()["cases"], (self.run["id"], "failed")
        return [n for n in names if n in cases and (cases[n]["run"], cases[n]["status"]) == own]

    def rates(self, section: str) -> dict[str, float]:
        """What this run measured as the section's first case; empty before."""
        entry = self.load()["cases"].get(f"{section}/rates")
        return entry["rates"] if entry is not None and entry["run"] == self.run["id"] else {}


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _cells(row: dict) -> tuple[str, ...]:
    share = None if row["floor_ms"] is None else row["floor_ms"] / row["ms"]
    memory = None if row["memory"] is None else row["memory"] / 2**20
    return (
        row["side"],
        _number(row["ms"], 4),
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        _number(row["floor_ms"], 4),
        "" if share is None else f"{share:.0%}",
        _number(row["tokens_per_second"], 4),
        _number(memory, 4),
        _number(row["host_ms"], 3),
        "" if row["difference"] is None else f"{row['difference']:.1e}",
    )


def _verdict(reached: bool | None) -> str:
    return {True: "reached", False: "missed", None: "not judged, a side is missing"}[reached]


def _remarks(entry: dict) -> list[str]:
    lines = [f"goal: {text}: {_verdict(reached)}" for text, reached in entry["goals"]]
    lines += [f"not run: {side}: {why}" for side, why in entry["skipped"].items()]
    lines += [f"{name}: {rate / 1e12:.3g}e12 per second" for name, rate in entry["rates"].items()]
    return lines + entry["notes"]


def _lines(name: str, entry: dict) -> list[str]:
    """A case for the terminal."""
    lines = [f"\n== {name}: {entry['status']} in {entry['seconds']} s {entry['why']}"]
    if entry["rows"]:
        table = [HEADS, *(_cells(row) for row in entry["rows"])]
        widths = [max(len(cells[i]) for cells in table) + 2 for i in range(len(HEADS))]
        lines += [
            "".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        ]
    return lines + _remarks(entry)


def markdown(found: dict) -> str:
    """The whole file as one page: versions, then every case by section."""
    lines = [f"# {found['machine']}", ""]
    for run in found["runs"].values():
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(
            f"- commit {run['commit']} (sources {run['source']}), {run['date']}: {versions}"
        )
    lines += [
        "",
        "`make gpu` wrote this. Times are medians; ratio is the median of side / fastft, the sides",
        "alternating; differs is the largest relative distance of a result from the first side's.",
    ]
    for section in ("build", "test", "bench-ops", "bench-steps", "bench-decode"):
        cases = {n: c for n, c in found["cases"].items() if n.split("/")[0] == section}
        if cases:
            lines += ["", f"## {section}"]
        skipped = {}
        for name, entry in cases.items():
            title, run = name.split("/", 1)[1], found["runs"][entry["run"]]
            commit = f" (at {run['commit']})" if len(found["runs"]) > 1 else ""
            if entry["status"] == "skipped":
                skipped.setdefault(entry["why"] + commit, []).append(title)
                continue
            lines += ["", f"**{title}**{commit}: {entry['status']} {entry['why']}".rstrip(), ""]
            if entry["rows"]:
                lines += ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
                lines += ["| " + " | ".join(_cells(row)) + " |" for row in entry["rows"]]
                lines.append("")
            lines += [f"- {line}" for line in _remarks(entry)]
        lines += [f"\nSkipped, {why}: {'; '.join(titles)}" for why, titles in skipped.items()]
    return "\n".join(lines) + "\n"
