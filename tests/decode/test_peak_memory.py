"""The peak of a process is its own: not what the one that started it held."""

import subprocess
import sys

import torch

from fastft.decode.peak_memory import peak, peak_of_process


def test_grows_with_what_is_held():
    before = peak_of_process()
    held = torch.ones(before // 4 + (1 << 24))  # more than ever was, by 64 MB
    assert peak(held.device) >= before + (1 << 25)


def test_is_not_that_of_the_parent():
    held = torch.ones(1 << 28)  # 1 GB
    code = "from fastft.decode.peak_memory import *; print(peak_of_process())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < peak_of_process() - held.nbytes // 4
