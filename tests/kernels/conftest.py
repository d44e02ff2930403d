"""Triton kernels run interpreted on the CPU, from this tree; tests/test_kernels.py starts them.

The interpreter takes the place of the compiler when a kernel is defined, so these tests have a
process of their own, with TRITON_INTERPRET set. It rounds and multiplies bfloat16 wrongly, so
kernels are tried here in float32 and float16; bfloat16 is compiled, and run on GPUs.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


def load_kernels() -> None:
    """Binds fastft.kernels to this tree's kernels/triton, installed or not."""
    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        "fastft.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastft.kernels"] = module
    spec.loader.exec_module(module)


load_kernels()


@pytest.fixture(autouse=True)
def _nan_filled():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
