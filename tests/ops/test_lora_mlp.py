"""lora_mlp against the composition that transformers and PEFT run, and a float64 truth."""

import pytest
import torch
from torch.nn.functional import dropout, gelu, silu
from truth import assert_as_exact

from fastft.ops.lora import LoraLinear
from fastft.ops.lora_mlp import lora_mlp

ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
SCALE = 0.7


def make(*sizes, dtype=torch.float32, std=0.2, grad=True):
    return (torch.randn(*sizes) * std).to(dtype).requires_grad_(grad)


def layers(hidden, intermediate, rank, dtype, adapter_dtype, grad=False):
    sizes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    tensors = []
    for outputs, inputs in sizes:
        tensors += [
            make(outputs, inputs, dtype=dtype, grad=grad),
            make(outputs, dtype=dtype, grad=grad),
            make(rank, inputs, dtype=adapter_dtype),
            make(outputs, rank, dtype=adapter_dtype),
        ]
    return tensors


def eager(activation, p=0.0):
    def one(x, weight, bias, a, b):
        y = torch.nn.functional.linear(x, weight, bias)
        if a is None:
            return y
        return (y + dropout(x.to(a.dtype), p) @ a.t() @ b.t() * SCALE).to(y.dtype)

    def run(x, *t):
        if p:
            torch.manual_seed(3)
        gate, up = one(x, *t[:4]), one(x, *t[4:8])
        return one(ACTIVATIONS[activation](gate) * up, *t[8:])

    return run


def fused(activation, p=0.0):
    def run(x, *t):
        if p:
            torch.manual_seed(3)
        linears = [LoraLinear(*t[i : i + 4], SCALE, p) for i in (0, 4, 8)]
        return lora_mlp(x, *linears, activation)

    return run


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_as_exact_as_eager(activation, dtype, adapter_dtype):
    # In half precision a handful of roundings is luck: only larger tensors measure an error.
    for shape, intermediate in (((3, 25, 24), 40), ((61, 17), 33), ((0, 6), 11)):
        x = make(*shape, dtype=dtype, std=1.0)
        tensors = layers(shape[-1], intermediate, 3, dtype, adapter_dtype)
        assert_as_exact(fused(activation), eager(activation), (x, *tensors))


def test_without_adapters_and_with_a_trained_base():
    tensors = layers(10, 16, 2, torch.float32, torch.float32, grad=True)
    assert_as_exact(fused("silu"), eager("silu"), (make(9, 10), *tensors))
    for i in (2, 3, 6, 7, 10, 11):
        tensors[i] = None
    assert_as_exact(fused("silu"), eager("silu"), (make(9, 10), *tensors))


def test_dropout_draws_pefts_masks():
    tensors = layers(20, 33, 4, torch.float32, torch.float32)
    assert_as_exact(fused("silu", 0.2), eager("silu", 0.2), (make(12, 20), *tensors))


def test_partly_frozen():
    tensors = layers(10, 16, 2, torch.float32, torch.float32)
    for frozen in (tensors[2:4], tensors[10:]):
        for tensor in frozen:
            tensor.requires_grad_(False)
        assert_as_exact(fused("silu"), eager("silu"), (make(9, 10), *tensors))
    assert_as_exact(fused("silu"), eager("silu"), (make(9, 10, grad=False), *tensors))


def test_compiles_in_one_graph():
    args = (make(6, 8), *layers(8, 12, 2, torch.float32, torch.float32))
    assert_as_exact(torch.compile(fused("silu"), fullgraph=True), fused("silu"), args)


def test_errors_name_the_argument():
    tensors = layers(8, 12, 2, torch.float32, torch.float32)
    gate, up, down = (LoraLinear(*tensors[i : i + 4]) for i in (0, 4, 8))
    with pytest.raises(ValueError, match="up.weight: expected"):
        lora_mlp(make(2, 8), gate, down, down)
    with pytest.raises(ValueError, match="activation"):
        lora_mlp(make(2, 8), gate, up, down, "relu")
