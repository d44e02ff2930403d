"""The one wheel under other versions: an environment for each, smoke.py and some tests in it.

    make wheel && make matrix                      # every combination, then a table
    make matrix ARGS="--only 'torch 2.11' --cuda"

The versions are installed first, then the wheel, without dependencies, so that nothing replaces
them. What cannot be had here is skipped with the reason: no interpreter, no wheel for it in dist/,
a version that the index lacks, or a torch whose CUDA libraries are gigabytes (--cuda takes them).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Operators on the stable ABI, what transformers and PEFT changed from version to version.
TESTS = (
    "tests/ops/test_norm.py",
    "tests/ops/test_lora.py",
    "tests/ops/test_decoder_layer.py",
    "tests/patch/test_patch.py",
    "tests/patch/test_others.py",
    "tests/decode/test_cache.py",
    "tests/decode/test_handover.py",
)
# Whatever the versions under test: what the tests themselves need.
TOOLS = ("pytest", "hypothesis", "expecttest", "safetensors", "setuptools", "ninja")
LATEST = ""


class Skip(Exception):
    """Why a combination cannot be had here."""


@dataclass(frozen=True)
class Combination:
    """Versions as pip takes them behind a name; LATEST: the newest there is."""

    name: str
    torch: str = "==2.13.*"
    transformers: str = "==5.24.*"
    peft: str = "==0.21.*"
    trl: str = "==1.16.*"
    python: str = "3.11"

    def requirements(self) -> list[str]:
        names = ("torch", "transformers", "peft", "trl")
        return [name + getattr(self, name) for name in names]


COMBINATIONS = (
    Combination("tested"),
    Combination("torch 2.11", torch="==2.11.*"),
    Combination("torch 2.12", torch="==2.12.*"),
    Combination("torch newest", torch=LATEST),
    Combination("transformers 5.17", transformers="==5.17.*"),
    Combination("peft 0.19", peft="==0.19.*"),
    Combination("libraries newest", transformers=LATEST, peft=LATEST, trl=LATEST),
    Combination("python 3.12", python="3.12"),
    Combination("python 3.13", python="3.13"),
)


@dataclass
class Outcome:
    result: str
    versions: dict[str, str] = field(default_factory=dict)


def run(command: Sequence[object], **options: object) -> subprocess.CompletedProcess[str]:
    texts = [str(part) for part in command]
    return subprocess.run(texts, capture_output=True, text=True, **options)


def interpreter(version: str) -> str:
    """A Python of this version, one that starts: a shim of a version manager may not."""
    kept = Path.home().glob(f".pyenv/versions/{version}*/bin/python")
    told = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in (sys._base_executable, shutil.which(f"python{version}"), *kept):
        if candidate and run([candidate, "-c", told]).stdout.strip() == version:
            return str(candidate)
    raise Skip(f"no Python {version} here")


def wheel_for(version: str, folder: Path) -> Path:
    tag = "cp" + version.replace(".", "")
    found = sorted(folder.glob(f"fastft-*-{tag}-{tag}-*.whl"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise Skip(
            f"no wheel for Python {version} in {folder.name}/: "
            f"make wheel PYTHON=python{version} VENV=.venv-{version}"
        )
    return found[-1]


def refuse_gigabytes(pip: list[str], combination: Combination) -> None:
    """Skip where pip would install NVIDIA's libraries with torch, or finds no such version."""
    done = run(
        [*pip, "install", "--quiet", "--dry-run", "--report", "-", *combination.requirements()]
    )
    if done.returncode:
        raise Skip(last_line(done.stderr))
    planned = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    heavy = [f"{m['name']} {m['version']}" for m in planned if m["name"].startswith("nvidia-")]
    if heavy:
        torch = next(m["version"] for m in planned if m["name"] == "torch")
        raise Skip(f"torch {torch} comes with {len(heavy)} CUDA libraries: --cuda")


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1])[:120] if lines else "no output"


def attempt(combination: Combination, options: argparse.Namespace) -> Outcome:
    """Raises: Skip."""
    base = interpreter(combination.python)
    wheel = wheel_for(combination.python, options.dist)
    with tempfile.TemporaryDirectory(prefix="fastft-matrix-") as scratch:
        run([base, "-m", "venv", f"{scratch}/venv"], check=True)
        python = f"{scratch}/venv/bin/python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        if not options.cuda:
            refuse_gigabytes(pip, combination)
        done = run([*pip, "install", "--quiet", *combination.requirements(), *TOOLS])
        if done.returncode:
            raise Skip(last_line(done.stderr))
        run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
        told = json.loads(run([*pip, "list", "--format", "json"]).stdout)
        versions = {entry["name"].lower(): entry["version"] for entry in told}
        return Outcome(proven(python, Path(scratch)), versions)


def proven(python: str, elsewhere: Path) -> str:
    """smoke.py and TESTS against the installed wheel, from where no source of it lies."""
    done = run([python, ROOT / "tests/smoke.py"], cwd=elsewhere)
    if done.returncode:
        return f"FAILED smoke: {last_line(done.stderr)}"
    # -P: the current folder, where the source lies, is not looked in.
    command = [python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile"]
    done = run([*command, "-o", "pythonpath=tests tests/patch", *TESTS], cwd=ROOT)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        return f"FAILED: {last_line(done.stdout)}"
    return last_line(done.stdout)


def table(outcomes: dict[Combination, Outcome]) -> str:
    names = ("torch", "transformers", "peft", "trl")
    rows = [("combination", "python", *names, "result")]
    for combination, outcome in outcomes.items():
        found = [outcome.versions.get(name, "-") for name in names]
        rows.append((combination.name, combination.python, *found, outcome.result))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", action="append", default=[], help="a combination's name")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheels are")
    parser.add_argument("--cuda", action="store_true", help="take a torch of gigabytes too")
    options = parser.parse_args()
    unknown = set(options.only) - {c.name for c in COMBINATIONS}
    if unknown:
        parser.error(f"--only: expected {', '.join(c.name for c in COMBINATIONS)}, got {unknown}")
    outcomes = {}
    for combination in COMBINATIONS:
        if options.only and combination.name not in options.only:
            continue
        print(f"{combination.name} …", file=sys.stderr, flush=True)
        try:
            outcomes[combination] = attempt(combination, options)
        except Skip as reason:
            outcomes[combination] = Outcome(f"skipped: {reason}")
    print(table(outcomes))
    sys.exit(any(outcome.result.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
