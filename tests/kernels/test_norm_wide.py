"""The norms of rows that one program takes in blocks, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import norm, norm_wide
from test_norm import both

SHAPES = [(1, 1), (5, 33), (3, 64), (4, 129)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Every row is a long one, and few of them end with a block."""
    monkeypatch.setattr(norm, "LONGEST", 0)
    monkeypatch.setattr(norm_wide, "BLOCK", 32)
    monkeypatch.setattr(norm_wide, "COLUMNS", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(dtype, residual, shape):
    both(shape, dtype, residual)


def test_a_row_longer_than_the_registers(monkeypatch):
    monkeypatch.undo()
    both((2, norm.LONGEST + 5), torch.float16, True)


def test_no_rows_rows_that_lie_apart_far_from_zero_and_next_to_it():
    both((0, 40), torch.float32, True)
    base = torch.randn(9, 2, 40) + 1000.0
    both((9, 40), torch.float32, False, base[:, 0], base[:, 1])
    both((5, 40), torch.float32, False, 1e-3 * torch.randn(5, 40))
