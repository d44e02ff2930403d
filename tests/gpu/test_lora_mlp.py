"""lora_mlp on the GPU."""

# ruff: noqa: F401
# The tests imported by name are the CPU's; they run here again, on the device.

import pytest
from gpu import suite
from ops import test_lora_mlp as lora_mlp
from ops.test_lora_mlp import (
    test_partly_frozen,
    test_without_adapters_and_with_a_trained_base,
)

pytestmark = pytest.mark.usefixtures("on_device")


def cases():
    for activation in lora_mlp.ACTIVATIONS:

        def make(dtype):
            x = lora_mlp.make(90, 72, dtype=dtype, std=1.0)
            return x, *lora_mlp.layers(72, 200, 8, dtype, dtype)

        ours, eager = lora_mlp.fused(activation), lora_mlp.eager(activation)
        yield f"lora_mlp {activation}", suite.Case(ours, eager, make)


test_as_exact_as_eager, test_twice_the_same_bits, test_compiles_in_one_graph = suite.tests(
    dict(cases()), compiled="lora_mlp silu"
)
