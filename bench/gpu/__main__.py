"""`make gpu`: builds, proves and measures everything on one GPU, in five sections.

Every section runs in processes of its own, so that a crash costs one case; every case is written to
bench/results/<gpu>.json when it ends, so that a run that was stopped goes on where it was.
"""

import argparse
import subprocess
import sys
import time
import uuid

from bench.gpu.tree import ROOT, load_kernels

GRACE = 30.0  # seconds beyond its time, after which a section's process is ended


def parser() -> argparse.ArgumentParser:
    from bench.gpu.sections import SECTIONS

    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
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


def results_of(options):
    from bench.gpu import results

    run = results.describe(options.device, options.toy, options.commit)
    folder = results.folder_for(options.device, options.results)
    return results.Results(folder, run, options.invocation)


def section_in_processes(section: str, arguments: list[str], options, results) -> list[str]:
    """Starts processes until nothing is left or the time is over; gives what is left."""
    from bench.gpu.sections import cases_of

    names = [c.name for c in cases_of(section) if options.only in c.name]
    deadline = time.time() + 60 * options.minutes
    while (left := results.pending(names, options.fresh)) and time.time() < deadline:
        results.begin(None)
        command = [sys.executable, "-m", "bench.gpu", *arguments, "--section", section,
                   "--invocation", results.invocation, "--deadline", str(deadline)]  # fmt: skip
        child = subprocess.Popen(command, cwd=ROOT)
        try:
            ended = child.wait(deadline - time.time() + GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ended = "no answer"
        record_death(results, section, left, ended)
    return results.pending(names, options.fresh)


def record_death(results, section: str, before: list[str], ended: int | str) -> None:
    """A case that took its process with it has failed; so has one that none could be started for.

    Time running out is no failure: then the process ends by itself and nothing is running.
    """
    from bench.gpu.case import Report

    name = results.running()
    if name is None and ended and results.pending(before, False) == before:
        name = before[0]
    if name is not None:
        why = "its process gave no answer" if ended == "no answer" else f"its process gave {ended}"
        results.record(name, "failed", Report(), 0.0, why)


def parent(options, arguments: list[str]) -> int:
    from bench.gpu.sections import SECTIONS, cases_of

    results = results_of(options)
    print(f"{results.run['machine']}, {results.run['commit']}, {results.run['versions']}")
    failed, left = [], []
    for section in options.section or SECTIONS:
        start = time.time()
        rest = section_in_processes(section, arguments, options, results)
        failed += results.failed([c.name for c in cases_of(section) if options.only in c.name])
        left += [name for name in rest if name not in failed]
        print(f"\n{section}: {time.time() - start:.0f} s", flush=True)
    for name in failed:
        print(f"failed: {name}")
    for name in left:
        print(f"not run yet, start again: {name}")
    print(f"{results.path} and {results.path.with_suffix('.md').name} hold what ran")
    return 1 if failed or left else 0


def main() -> int:
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit(f"{sys.executable} has no torch: make gpu PYTHON=a Python that has a CUDA torch")
    options = parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible: --device cpu --toy shows what would run")
    if options.device == "cpu" and not options.toy:
        sys.exit("without a GPU only --toy makes sense; make bench measures the CPU")
    load_kernels()
    if options.invocation is None:
        options.invocation = uuid.uuid4().hex[:12]
        # The parent passes on what it was given, and chooses the sections itself.
        passed = [f"--device={options.device}", f"--only={options.only}"]
        passed += ["--toy"] * options.toy + ["--fresh"] * options.fresh
        passed += [f"--results={options.results}"] if options.results else []
        passed += [f"--commit={options.commit}"] if options.commit else []
        return parent(options, passed)
    from bench.gpu.case import Here
    from bench.gpu.runner import run_section

    here = Here(options.device, options.toy)
    run_section(options.section[0], here, results_of(options), options.deadline, options.fresh,
                options.only)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
