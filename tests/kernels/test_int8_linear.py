"""The Triton pass over integer sums, interpreted, against the reference."""

import pytest
import torch
from fastft.kernels import int8_linear

from fastft.ops.int8_linear import _scale_sums_


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (2, int8_linear.LONGEST + 9)])
def test_scaling_sums(extras, shape):
    sums = torch.randint(-(2**22), 2**22, shape, dtype=torch.int32)
    a, wide = torch.rand(shape[0]), torch.randn(shape[0], shape[1] + 3)
    b, bias, total = torch.rand(shape[1]), torch.randn(shape[1]), wide[:, : shape[1]]
    b, bias, total = (b, bias, total) if extras else (None, None, None)
    wanted = sums.clone()
    _scale_sums_.reference(wanted, a, b, bias, total)
    int8_linear.scale_sums_(sums, a, b, bias, total)
    wanted, got = wanted.view(torch.float32), sums.view(torch.float32)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
