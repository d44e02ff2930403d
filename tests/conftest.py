"""Shared by all tests: uninitialised memory is NaN, threads are fixed, compiled code is cached."""

import pytest
import torch
from hypothesis import settings

# The relative rule compares two rounding errors, and on a few elements luck decides: the shapes
# tried are the same in every run. `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="where tests/gpu runs: cuda or cpu")


def pytest_collection_modifyitems(items):
    # The files that compile take minutes: first, so that no process waits for them at the end.
    items.sort(key=lambda item: item.path.name not in ("test_cuda.py", "test_kernels.py"))


@pytest.fixture(autouse=True, scope="session")
def _fixed_threads(request):
    # Processes of pytest-xdist share the cores: threads that wait for each other would take turns.
    workers = getattr(request.config, "workerinput", {}).get("workercount", 1)
    torch.set_num_threads(max(1, min(2, torch.get_num_threads() // workers)))


@pytest.fixture(autouse=True)
def _seed_and_nan_fill():
    """`torch.empty` gives NaN, so an element nobody writes shows; and every test starts alike."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512vnni"])
def isa(request):
    """Runs the test once per instruction set this processor has."""
    from fastft.library import extension

    if extension is None:
        pytest.skip("fastft._C is not built")
    if extension.limit_isa(request.param) != request.param:
        extension.limit_isa("avx512vnni")
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    extension.limit_isa("avx512vnni")


@pytest.fixture
def fp8_anywhere(monkeypatch):
    """base_weights="fp8" is not refused: the reference computes it, as it may where a test asks."""
    monkeypatch.setattr("fastft.ops.fp8_linear.why_not", lambda device: None)


@pytest.fixture(params=["int8", "fp8"])
def base(request):
    """The kinds of base_weights."""
    if request.param == "fp8":
        request.getfixturevalue("fp8_anywhere")
    return request.param
