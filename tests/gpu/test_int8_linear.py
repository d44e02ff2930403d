"""int8_linear on the GPU: rounding, exact sums, layers and adapters over int8 weights."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from ops.test_int8_linear import (
    test_adapters_over_int8_weights,
    test_columns_apart,
    test_columns_of_a_weight,
    test_frozen_inputs_cost_no_product,
    test_gated_mlp_over_int8_weights,
    test_large_columns_do_not_spoil_the_others,
    test_layer_and_gradients_against_the_formula,
    test_opcheck,
    test_product_of_any_shape,
    test_product_onto_a_total,
    test_rounding,
    test_rows_that_are_zero_or_not_finite,
    test_scaled_sums,
    test_sums_are_exact,
)

pytestmark = pytest.mark.usefixtures("on_device")
