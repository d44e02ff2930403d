"""The tests of a GPU. `pytest tests/gpu --device cpu` runs the same functions on the CPU.

Without a CUDA device every file is one skip that says so.
"""

from pathlib import Path

import pytest
import torch

from bench.gpu.tree import load_kernels

load_kernels()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cuda" or torch.cuda.is_available():
        return
    seen, kept, left_out = set(), [], []
    for item in items:
        here = Path(__file__).parent in item.path.parents
        (left_out if here and item.path in seen else kept).append(item)
        if here and item.path not in seen:
            seen.add(item.path)
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible: the whole file"))
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def on_device(device, monkeypatch):
    """Tensors are made there unless told otherwise; small ones do not go to PyTorch's operators."""
    monkeypatch.setattr("fastft.ops.norm._EAGER_BELOW", 0)
    monkeypatch.setattr("fastft.ops.gated_mlp._EAGER_SIZES", {})
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def isa(device):
    """Takes the place of the CPU's instruction sets in the tests that are run again here."""
    return device


@pytest.fixture(autouse=True)
def _opcheck_needs_expecttest(request):
    if "opcheck" in request.node.name:
        pytest.importorskip("expecttest")
