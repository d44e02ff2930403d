"""rotary on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from gpu import suite
from ops import test_rotary as rotary
from ops.test_rotary import (
    test_angles_of_another_half_dtype,
    test_any_shape,
    test_float32_angles_with_half_precision_queries,
    test_kernel_and_reference_agree_in_layout,
    test_no_gradient_that_nobody_needs,
    test_opcheck,
    test_results_and_gradients_lie_as_the_inputs_do,
    test_same_meaning_as_llama,
    test_strided_inputs,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for head_dim, rotary_dim in ((2, 2), (64, 64), (80, 32), (100, 90), (256, 256)):
        for batch, swapped in ((1, False), (3, True)):

            def make(dtype, sizes=(head_dim, rotary_dim), batch=batch, swapped=swapped):
                q, k = (rotary.heads(3, n, 37, sizes[0], dtype) for n in (5, 2))
                if swapped:
                    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k))
                return q, k, *rotary.angles(batch, 37, sizes[1], dtype), 1 + swapped

            yield (
                f"rotary {rotary_dim} of {head_dim}{' swapped' * swapped}",
                suite.Case(rotary.fused, rotary.eager, make),
            )


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="rotary 32 of 80"
)
