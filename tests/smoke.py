"""What an installed fastft must do, run by file name from a folder that holds no source of it."""

import subprocess
import sys
from pathlib import Path

import torch

import fastft
import fastft.library
from fastft.ops.norm import rms_norm


def is_the_installed_one():
    source = Path(__file__).resolve().parents[1] / "fastft"
    assert Path(fastft.__file__).resolve().parent != source, fastft.__file__


def holds_the_kernels():
    assert fastft.library.extension is not None, "fastft._C is missing from the wheel"
    assert fastft.library.operators()["rms_norm"]["cpu"] == "C++"


def agrees_with_eager():
    x, weight = torch.randn(7, 96), torch.randn(96)
    wanted = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), wanted)


def doctor_runs():
    command = [sys.executable, "-m", "fastft", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rms_norm" in done.stdout and "C++" in done.stdout, done.stdout


if __name__ == "__main__":
    checks = [is_the_installed_one, holds_the_kernels, agrees_with_eager, doctor_runs]
    for check in checks:
        check()
        print(f"{check.__name__.replace('_', ' ')}: ok")
    print(f"{len(checks)} passed, 0 failed")
