"""The command behind `make gpu`: builds, proves and measures everything on one GPU.

Every section runs in processes of its own, so that a crash costs one case; every case is written to
bench/results/<gpu>.json when it ends, so that a run that was stopped goes on where it was.
"""

import argparse
import subprocess
import sys
import time
import traceback
import uuid

import torch

from bench.gpu.case import Here, Report
from bench.gpu.results import Results, describe, folder_for
from bench.gpu.runner import run_section
from bench.gpu.sections import SECTIONS, cases_of
from bench.gpu.tree import ROOT, load_kernels

GRACE = 30.0  # seconds beyond its time, after which a section's process is ended


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Build, prove and measure everything on one GPU."
    )
    parser.add_argument("--section", action="append", choices=SECTIONS, help="this one (repeat)")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--fresh", action="store_true", help="run also what is there already")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that all runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="for each section")
    parser.add_argument("--results", metavar="FOLDER", help="in place of bench/results")
    parser.add_argument("--commit", help="what to call these sources where git is not at hand")
    parser.add_argument("--invocation", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser


def here_of(options) -> Here:
    return Here(options.device, options.toy)


def results_of(options) -> Results:
    run = describe(options.device, options.toy, options.commit)
    return Results(folder_for(options.device, options.results), run, options.invocation)


def section_in_processes(section: str, options, results: Results) -> list[str]:
    """Starts processes until nothing is left or the time is over; gives what is left."""
    names = [case.name for case in cases_of(section, here_of(options), options.only)]
    deadline = time.time() + 60 * options.minutes
    while (left := results.pending(names, options.fresh)) and time.time() < deadline:
        results.begin(None)
        command = [sys.executable, "-m", "bench.gpu", *passed_on(options), f"--section={section}",
                   f"--invocation={results.invocation}", f"--deadline={deadline}"]  # fmt: skip
        child = subprocess.Popen(command, cwd=ROOT)
        try:
            ended = f"ended with {child.wait(deadline - time.time() + GRACE)}"
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ended = "gave no answer"
        stuck = results.running()
        if stuck is None and results.pending(names, options.fresh) == left:
            if time.time() < deadline:
                results.record(left[0], "failed", Report(), 0.0, f"before it, its process {ended}")
            break
        if stuck is not None:
            results.record(stuck, "failed", Report(), 0.0, f"its process {ended}")
    return results.pending(names, options.fresh)


def passed_on(options) -> list[str]:
    """The options that a section's process shares."""
    shared = [f"--device={options.device}", f"--only={options.only}"]
    shared += ["--toy"] * options.toy + ["--fresh"] * options.fresh
    shared += [f"--commit={options.commit}"] if options.commit else []
    # As an absolute path: the process starts in the root of the sources.
    return [*shared, f"--results={folder_for(options.device, options.results)}"]


def parent(options) -> int:
    """All sections; 1 where a case failed or is still to run."""
    results = results_of(options)
    print(f"{results.run['machine']}, {results.run['commit']}, {results.run['versions']}")
    failed, left = [], []
    for section in options.section or SECTIONS:
        start = time.time()
        try:
            rest = section_in_processes(section, options, results)
            failed += results.failed(
                [case.name for case in cases_of(section, here_of(options), options.only)]
            )
        except Exception:  # its files cannot be imported
            traceback.print_exc()
            failed.append(section)
            continue
        left += [name for name in rest if name not in failed]
        print(f"\n{section}: {time.time() - start:.0f} s", flush=True)
    for name in failed:
        print(f"failed: {name}")
    for name in left:
        print(f"not run yet, start again: {name}")
    print(f"{results.path} and {results.path.with_suffix('.md').name} hold what ran")
    return 1 if failed or left else 0


def main() -> int:
    options = parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible: --device cpu --toy shows what would run")
    if options.device == "cpu" and not options.toy:
        sys.exit("without a GPU only --toy makes sense; make bench measures the CPU")
    load_kernels()
    if options.invocation is None:
        options.invocation = uuid.uuid4().hex[:12]
        return parent(options)
    run_section(
        options.section[0],
        here_of(options),
        results_of(options),
        options.deadline,
        options.fresh,
        options.only,
    )
    return 0
