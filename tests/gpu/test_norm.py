"""norm on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from gpu import suite
from ops import test_norm as norm
from ops.test_norm import (
    test_any_shape,
    test_errors_name_the_argument,
    test_opcheck,
    test_rows_far_from_zero,
    test_strided_inputs,
    test_tiny_hidden_sizes,
    test_weight_of_another_dtype_and_frozen_weight,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for rows, hidden in ((1, 9), (33, 577), (70, 4096), (5, 5000)):
        for residual in (False, True):

            def make(dtype, shape=(rows, hidden), residual=residual):
                return norm.inputs(dtype, shape, residual)

            name = f"{rows}x{hidden}{' residual' * residual}"
            yield (
                f"layer_norm {name}",
                suite.Case(norm.fused_layer_norm, norm.eager_layer_norm, make),
            )
            for offset in (0.0, 1.0):

                def rms(dtype, make=make, offset=offset):
                    return *make(dtype)[:3], offset

                case = suite.Case(norm.fused_rms_norm, norm.eager_rms_norm, rms)
                yield f"rms_norm {name} offset {offset}", case


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="rms_norm 33x577 residual offset 1.0"
)
