"""The five sections and their cases; build and test are processes, the others measure here."""

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.gpu.case import Case, Here, Report, Row
from bench.gpu.measure import Session, rates
from bench.gpu.tree import ROOT

SECTIONS = ("build", "test", "bench-ops", "bench-steps", "bench-decode")


class Failed(Exception):
    """A command ended badly; the message is the end of what it printed."""


def _run(*arguments: str, limit: float) -> tuple[str, float]:
    """What a command printed, and how many seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        raise Failed(f"{' '.join(arguments)} gave {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout, time.perf_counter() - start


def build(session: Session) -> Report:
    """The compiled extension, in place; only what is out of date is compiled."""
    _, seconds = _run("setup.py", "--quiet", "build_ext", "--inplace", limit=460)
    return Report(rows=[Row("setup.py build_ext", seconds * 1e3)])


def doctor(session: Session) -> Report:
    """What serves each operator, as told by the package itself."""
    code = "import json, fastft.doctor as d; f = d.examine(); print(d.text(f)); print(f['build'])"
    told, _ = _run("-c", code, limit=120)
    return Report(notes=[line.strip() for line in told.splitlines() if line.strip()])


def workers(here: Here) -> int:
    """Processes of pytest-xdist, where it is there: compiling kernels is most of the work."""
    if here.device != "cuda" or importlib.util.find_spec("xdist") is None:
        return 0
    return min(8, (os.cpu_count() or 2) // 2, torch.cuda.mem_get_info()[0] >> 32)


def tests(session: Session, path: str) -> Report:
    """A file of tests/gpu, of toys a few tests of each. Every failure is named."""
    with TemporaryDirectory() as folder:
        told = Path(folder) / "report.xml"
        arguments = ["-m", "pytest", path, "-q", f"--device={session.here.device}"]
        arguments += [f"--junitxml={told}", "-p", "no:cacheprovider"]
        if session.here.toy:
            arguments += ["-k", "twice and float32 or lora_step and llama"]
        if count := workers(session.here):
            arguments += ["-n", str(count)]
        ended = None
        try:
            _run(*arguments, limit=450)
        except Failed as error:
            ended = error
        if not told.exists():
            raise ended or Failed("pytest wrote no report")
        report, failures = read_report(told)
    if failures or ended:
        raise Failed("; ".join([*report.notes, *failures]) or str(ended))
    return report


def read_report(path: Path) -> tuple[Report, list[str]]:
    """Counts, and the names of what failed with the first line of why."""
    report, failures, skipped, count = Report(), [], {}, 0
    for case in xml.parse(path).iter("testcase"):
        count += 1
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                why = (found.get("message") or "").splitlines() or [""]
                failures.append(f"{case.get('name')}: {why[0][:200]}")
        for found in case.findall("skipped"):
            skipped.setdefault(found.get("message") or "", []).append(case.get("name"))
    report.skipped = {", ".join(names): why for why, names in skipped.items()}
    total = sum(len(names) for names in skipped.values())
    report.notes.append(f"{count - len(failures) - total} of {count} passed, {total} skipped")
    return report, failures


def measured_rates(session: Session) -> Report:
    return Report(rates=rates(session.here, session.timer))


RATES = Case("rates", measured_rates)


def cases_of(section: str, here: Here, only: str = "") -> list[Case]:
    """Cases in the order of their importance, named <section>/<case>. May import fastft.

    only: those whose name holds this text, and the rates that their floors need.
    """
    if section == "build":
        found = [Case("setup.py", build, limit=470), Case("doctor", doctor)]
    elif section == "test":
        folder = ROOT / "tests" / "gpu"
        paths = [folder] if here.toy else sorted(folder.glob("test_*.py"))
        found = [Case.of(p.stem, tests, str(p.relative_to(ROOT)), limit=460) for p in paths]
    elif section == "bench-ops":
        ops, products = (importlib.import_module(f"bench.gpu.{n}") for n in ("ops", "products"))
        found = [RATES, *ops.kernel_cases(), *products.cases(), *ops.cases()]
    elif section == "bench-steps":
        files = (importlib.import_module(f"bench.gpu.{n}") for n in ("encoders", "steps", "base"))
        found = [RATES, *(case for file in files for case in file.cases())]
    else:
        name = section.removeprefix("bench-")
        found = [RATES, *importlib.import_module(f"bench.gpu.{name}").cases()]
    named = [dataclasses.replace(case, name=f"{section}/{case.name}") for case in found]
    return [c for c in named if only in c.name or c.name.endswith(f"/{RATES.name}")]
