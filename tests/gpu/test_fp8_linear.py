"""fp8_linear on the GPU: rounding, PyTorch's products, layers and adapters over fp8 weights."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
import torch
from ops.test_fp8_linear import (
    test_a_stored_weight,
    test_adapters_over_fp8_weights,
    test_adapters_over_fp8_weights_compile_and_cast,
    test_frozen_inputs_cost_no_product,
    test_gated_mlp_over_fp8_weights,
    test_large_columns_do_not_spoil_the_others,
    test_layer_and_gradients_against_the_formula,
    test_opcheck,
    test_products,
    test_rows_that_are_zero_or_not_finite,
    test_what_the_library_is_given,
)
from ops.test_round_rows import (
    test_nothing_overflows,
    test_rounding,
    test_strided_empty_and_float64,
    test_to_the_nearest_number_of_two_the_even_one,
)

from fastft.ops.fp8_linear import fp8_linear, quantize_fp8, why_not


@pytest.fixture
def has_fp8(device):
    lacking = why_not(torch.device(device)) if device == "cuda" else None
    if lacking is not None:
        pytest.skip(lacking)


pytestmark = pytest.mark.usefixtures("on_device", "has_fp8")


@pytest.mark.parametrize("inner, out", [(256, 192), (256, 100), (4096, 1024)])
def test_sums_are_as_exact_as_the_operands(inner, out):
    """Of long sums too, which PyTorch's product keeps in the tensor cores."""
    weight = quantize_fp8(torch.randn(out, inner) * 0.1)
    x = torch.rand(64, inner, dtype=torch.bfloat16)  # all of one sign: sums only grow
    x.requires_grad_()
    values = weight.values.double() * weight.scale.double()
    y = fp8_linear(x, weight)
    truth = x.detach().double() @ values.t()
    assert (y.double() - truth).norm() < 0.04 * truth.norm()
    y.backward(torch.ones_like(y))
    truth = torch.ones_like(y).double() @ values
    assert (x.grad.double() - truth).norm() < 0.04 * truth.norm()
