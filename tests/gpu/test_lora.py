"""lora on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
import torch
from gpu import suite
from ops import test_lora as lora
from ops.test_lora import (
    test_any_shape,
    test_gradients_of_a_trained_base,
    test_no_gradient_that_nobody_needs,
    test_onto_a_base_product_made_elsewhere,
    test_opcheck,
    test_several_linears_on_one_input,
    test_strided_inputs,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for tokens, inputs, outputs, rank in ((1, 13, 15, 1), (7, 65, 33, 3), (130, 100, 97, 8),
                                          (300, 576, 1000, 16), (64, 64, 64, 80)):  # fmt: skip
        for wide in (False, True):

            def make(dtype, sizes=(tokens, inputs, outputs, rank), wide=wide):
                tokens, inputs, outputs, rank = sizes
                x = lora.make(tokens, inputs, dtype=dtype)
                own = torch.float32 if wide else dtype
                return x, *lora.adapter(rank, inputs, outputs, (dtype, own))

            name = f"lora {tokens}x{inputs}->{outputs} rank {rank}{' float32 adapters' * wide}"
            yield name, suite.Case(lora.fused, lora.eager, make)


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="lora 130x100->97 rank 8"
)
