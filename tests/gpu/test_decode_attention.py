"""decode_attention on the GPU: its values, and its promise bit for bit."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from gpu import suite
from ops import test_decode_attention as decode
from ops.test_decode_attention import (
    test_any_shape,
    test_bits_do_not_depend_on_capacity_or_strides,
    test_bits_of_a_query_depend_on_nothing_beside_it,
    test_large_scores,
    test_nan_is_not_hidden,
    test_opcheck,
    test_queries_before_the_first_slot_are_zero,
    test_what_a_draft_holds_reaches_no_query_before_it,
    test_what_has_left_the_window_reaches_nobody,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    shapes = (([1, 17, 600], 1, 4, 4, 24), ([900], 16, 8, 1, 128), ([2, 5000], 5, 9, 3, 64))
    for lengths, *sizes in shapes:
        for options in ({}, {"window": 300, "softcap": 3.0}):

            def make(dtype, lengths=lengths, sizes=sizes):
                return decode.inputs(dtype, lengths, *sizes)

            case = suite.Case(
                lambda *tensors, n=lengths, o=options: decode.ours(n, **o)(*tensors),
                decode.eager(lengths, **options),
                make,
            )
            yield f"{lengths} {sizes} {options}", case


CASES = dict(cases())
test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    CASES, compiled=next(iter(CASES))
)
