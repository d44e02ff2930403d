"""gated_mlp on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
import torch
from gpu import suite
from ops import test_gated_mlp as mlp
from ops.test_gated_mlp import (
    test_any_shape,
    test_backward_gives_the_forward_again,
    test_infinity_and_nan_as_eager_in_float64,
    test_no_gradient_that_nobody_needs,
    test_opcheck,
    test_strided_inputs,
    test_upstream_gradient_of_any_layout,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for activation in mlp.ACTIVATIONS:
        for shape in ((1,), (3, 17), (2, 5, 64), (40, 4097)):
            yield (
                f"gated_mlp {activation} {shape}",
                suite.Case(
                    mlp.gated_mlp,
                    mlp.eager,
                    lambda dtype, s=shape, a=activation: (*mlp.inputs(dtype, *s), a),
                ),
            )

    def halves(dtype):
        both = (4 * torch.randn(7, 200)).to(dtype)
        return *(half.requires_grad_() for half in both.chunk(2, -1)), "silu"

    yield "gated_mlp halves", suite.Case(mlp.gated_mlp, mlp.eager, halves)


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="gated_mlp silu (40, 4097)"
)
