"""CUDA kernels run on the host, through emulator.h; tests/test_cuda.py starts them.

They are compiled with the address sanitizer, which must be in a process from its start: these tests
have one of their own, with FASTFT_EMULATED naming the folder of the compiled kernels.
"""

import ctypes
import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("FASTFT_EMULATED")
if FOLDER is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def emulated():
    """emulated("cross_entropy") is the library of that file of kernels/cuda."""

    def load(file: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(Path(FOLDER) / f"{file}.so"))

    return load


@pytest.fixture(params=["forwards", "backwards"])
def order(request, emulated):
    """Threads run in order and in reverse: a result that needs a missing barrier differs."""

    def load(file: str) -> ctypes.CDLL:
        library = emulated(file)
        library.emulator_run_backwards(request.param == "backwards")
        return library

    return load
