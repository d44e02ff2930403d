"""quantized_linear on the GPU: its values, and its promise bit for bit."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from gpu import suite
from ops import test_quantized_linear as quantized
from ops.test_quantized_linear import (
    test_a_row_has_the_same_bits_at_every_width,
    test_any_shape,
    test_float64_goes_through_the_reference,
    test_opcheck,
    test_strided_inputs,
    test_tensor_as_weight_and_other_types_of_adapter_and_bias,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for kind in quantized.KINDS:
        for rows, inputs, out, rank in ((1, 576, 200, 0), (5, 2048, 129, 8), (16, 128, 40, 64)):

            def make(dtype, kind=kind, sizes=(rows, inputs, out, rank)):
                return quantized.make_inputs(dtype, kind, *sizes)

            case = suite.Case(quantized.fused, quantized.eager, make)
            yield f"{kind} {rows}x{inputs}x{out} rank {rank}", case


CASES = dict(cases())
test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    CASES, compiled=next(iter(CASES))
)
