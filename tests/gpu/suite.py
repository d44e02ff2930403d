"""What every operator must show on the GPU.

Beside this, the operators' test files import those of the CPU's tests that do not look at the CPU's
own means (its threads, its autocast, its products counted): they run on the device as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from truth import assert_as_exact, leaves, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """ours and eager, on arguments made anew by make(dtype) on the device."""

    ours: Callable
    eager: Callable
    make: Callable[[torch.dtype], tuple]


def tests(cases: dict[str, Case], compiled: str) -> tuple[Callable, Callable, Callable]:
    """As exact as eager, twice the same bits, and for one case: compiles in one graph."""
    each = pytest.mark.parametrize("name", cases)
    dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

    @each
    @dtypes
    def as_exact_as_eager(name, dtype):
        case = cases[name]
        assert_as_exact(case.ours, case.eager, case.make(dtype))

    @each
    @dtypes
    def twice_the_same_bits(name, dtype):
        case = cases[name]
        args = case.make(dtype)
        first, second = (run(case.ours, leaves(args)) for _ in range(2))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b)

    def compiles_in_one_graph():
        case = cases[compiled]
        fused = torch.compile(case.ours, fullgraph=True)
        assert_as_exact(fused, case.eager, case.make(torch.float32))

    return as_exact_as_eager, twice_the_same_bits, compiles_in_one_graph
