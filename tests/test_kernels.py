"""The Triton kernels, proven without a GPU: interpreted for values, compiled for every target.

Each runs in a process of its own, since Triton chooses between interpreter and compiler at import.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p.stem
    for p in (ROOT / "kernels" / "triton").glob("*.py")
    if p.stem not in ("__init__", "common")
)
# Bytes of shared memory a block may have, by compute capability.
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Registers and spilled bytes, where Triton 3.7 takes a little more than the limits, unlike 3.6.
MORE_IN_3_7 = {("cross_entropy", "_in_place", 120): (168, 0), ("norm", "_backward", 100): (255, 32)}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("file", [*FILES, "launches"])
def test_interpreted(file):
    done = python(
        "-m", "pytest", "-q", f"tests/kernels/test_{file}.py",
        "-o", "pythonpath=tests/kernels .", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", FILES)
def test_compiles_for_every_architecture(file):
    done = python("tests/kernels/ahead_of_time.py", file)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    failed = [row for row in rows if "error" in row]
    assert not failed, failed[:3]
    newer = not importlib.metadata.version("triton").startswith("3.6.")
    known = MORE_IN_3_7 if newer else {}
    bad = []
    for row in rows:
        place = file, row["kernel"], row["architecture"]
        registers, spilled = known.get(place, row["limits"])
        if (
            row["registers"] > max(registers, row["limits"][0])
            or row["spilled"] > max(spilled, row["limits"][1])
            or row["shared"] > SHARED[row["architecture"]]
        ):
            bad.append(row)
    assert not bad, bad[:5]
