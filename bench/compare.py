"""`python -m bench.compare [OLD NEW]`: which ratios have changed; 1 where one fell more than 10%.

OLD and NEW are ratios files (bench/ratios.py). Without them, every such file in bench/results is
held against the one that is committed. Ratios of time and of memory count alike. What is missing
or new is told, and fails nothing.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bench.gpu.results import KEPT, ROOT
from bench.ratios import Ratios, parse

ALLOWED = 0.10
# Of a resident set a few MiB are chance: less than this is as good as this.
LEAST_MEMORY = 32.0
HEADS = ("work", "against", "of", "old", "new", "change", "")


def values(found: Ratios) -> dict[tuple[str, str, str], float]:
    """(work, side, what) -> the side over fastft, where more is better for fastft."""
    ratios = {}
    for row in found.rows:
        ratios[row.work, row.against, "time"] = row.ratio
        if row.memory is not None:
            theirs, ours = (max(size, LEAST_MEMORY) for size in row.memory)
            ratios[row.work, row.against, "memory"] = theirs / ours
    return ratios


def compare(old: Ratios, new: Ratios, allowed: float = ALLOWED) -> tuple[list[tuple], int]:
    """Lines of what is not as it was, and how many ratios fell by more than is allowed."""
    before, after = values(old), values(new)
    lines, fallen = [], 0
    for key in before | after:
        if key not in after:
            lines.append((*key, f"{before[key]:.2f}", "", "", "missing"))
        elif key not in before:
            lines.append((*key, "", f"{after[key]:.2f}", "", "new"))
        elif before[key] != after[key]:
            change = after[key] / before[key] - 1
            # Ratios are rounded numbers: 3.2 -> 2.88 is 10%, whatever binary fractions make of it.
            fell = change < -allowed - 1e-9
            fallen += fell
            numbers = f"{before[key]:.2f}", f"{after[key]:.2f}", f"{change:+.0%}"
            lines.append((*key, *numbers, "FELL" if fell else ""))
    return lines, fallen


def told(name: str, old: Ratios, new: Ratios, allowed: float = ALLOWED) -> int:
    """Prints a table; how many ratios fell."""
    lines, fallen = compare(old, new, allowed)
    processors = [{run["processor"] for run in each.runs.values()} for each in (old, new)]
    print(f"{name}: {len(values(new))} ratios, {len(lines)} not as before, {fallen} fell")
    if not processors[1] <= processors[0]:
        print(f"  of other processors: {processors[0]} before, {processors[1]} now")
    if lines:
        table = [HEADS, *lines]
        widths = [max(len(line[i]) for line in table) + 2 for i in range(len(HEADS))]
        for line in table:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  " + "".join(cells).rstrip())
    return fallen


def committed(path: Path, commit: str) -> Ratios | None:
    """The file as it was; None where there was none."""
    what = f"{commit}:{path.relative_to(ROOT)}"
    done = subprocess.run(("git", "show", what), cwd=ROOT, capture_output=True, text=True)
    return parse(done.stdout) if done.returncode == 0 else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="OLD NEW")
    parser.add_argument("--commit", default="HEAD", help="what to hold the files here against")
    parser.add_argument("--allowed", type=float, default=ALLOWED, help="share that may be lost")
    args = parser.parse_args(arguments)
    if len(args.files) not in (0, 2):
        parser.error("expected two files, OLD and NEW, or none")
    if args.files:
        old, new = (parse(path.read_text()) for path in args.files)
        return 1 if told(args.files[1].name, old, new, args.allowed) else 0
    fallen = 0
    for path in sorted(KEPT.glob("ratios-*.json")):
        if (old := committed(path, args.commit)) is None:
            print(f"{path.name}: not in {args.commit}")
        else:
            fallen += told(path.name, old, parse(path.read_text()), args.allowed)
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
