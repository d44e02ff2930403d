"""The peak of a process is its own: not what the one that started it held."""

import subprocess
import sys

import torch

from fastft.decode.peak_memory import peak_of_process

CHILD = """
import torch
from fastft.decode.peak_memory import peak, peak_of_process
before = peak_of_process()
held = torch.ones(before // 4 + 2**24)  # more than ever was, by 64 MB
print(before, peak(held.device))
"""


def test_is_not_that_of_the_parent_and_grows_with_what_is_held():
    held = torch.ones(2**28)  # 1 GB
    command = [sys.executable, "-c", CHILD]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert before < peak_of_process() - held.nbytes // 4
    assert after >= before + 2**25
