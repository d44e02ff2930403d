"""attention on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from gpu import suite
from ops.test_attention import (
    test_computes_no_gradient_nobody_needs,
    test_large_scores,
    test_length_one,
    test_nan_is_not_hidden,
    test_one_sequence_never_reaches_another,
    test_opcheck,
    test_rows_that_see_no_key_are_zero_with_zero_gradients,
    test_strided_inputs,
    test_unequal_lengths,
)
from packed import inputs as packed_inputs
from packed import sides as packed_sides

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    options = [
        {},
        {"causal": True},
        {"causal": True, "window": 5},
        {"window": 70},
        {"causal": True, "window": 100, "softcap": 3.0},
        {"softcap": 0.7, "scale": 0.3},
    ]
    sizes = (
        ([1, 17, 130], 4, 4, 20),
        ([70, 0, 5], 6, 2, 64),
        ([300], 2, 1, 128),
        ([90], 2, 1, 256),
    )
    for option in options:
        for lengths, *rest in sizes:

            def make(dtype, lengths=lengths, rest=rest):
                return packed_inputs(dtype, sum(lengths), sum(lengths), *rest)

            # Their bounds are made where the test runs, so on the device.
            def ours(*qkv, lengths=lengths, option=option):
                return packed_sides(lengths, **option)[0](*qkv)

            def eager(*qkv, lengths=lengths, option=option):
                return packed_sides(lengths, **option)[1](*qkv)

            name = f"attention {lengths} {rest[0]}/{rest[1]}x{rest[2]} {option}"
            yield name, suite.Case(ours, eager, make)


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="attention [300] 2/1x128 {'causal': True}"
)
