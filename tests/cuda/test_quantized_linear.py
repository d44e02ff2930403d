"""quantized_linear's CUDA kernels on the host: values, bits at every width, tails and alignment."""

import ctypes

import pytest
import torch
from launching import DTYPES, call, pointer
from same import assert_same

from fastft.ops.quantized_linear import (
    QuantizedWeight,
    _quantized_linear,
    dequantize,
    quantize,
)

# csrc/dtype.h
LAYOUTS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int8_grouped": 4, "int4": 5}


class FloatRows(ctypes.Structure):
    """csrc/quantized_linear.h"""

    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor):
        if tensor is None:
            return cls()
        return cls(pointer(tensor), DTYPES[tensor.dtype], tensor.stride(0))


class QuantizedLinear(ctypes.Structure):
    """csrc/quantized_linear.h"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "in", "out", "rank")),
        ("x", FloatRows),
        ("layout", ctypes.c_int),
        ("values", ctypes.c_void_p),
        ("values_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scale_stride", ctypes.c_int64),
        ("group", ctypes.c_int64),
        *((name, FloatRows) for name in ("bias", "a", "b")),
        ("lora_scale", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        *((name, ctypes.c_bool) for name in ("transposed", "onto", "round_inputs")),
    ]


def layout_of(values, scale):
    if scale is None:
        return str(values.dtype).removeprefix("torch.")
    if values.dtype is torch.uint8:
        return "int4"
    return "int8" if scale.dtype is torch.float32 else "int8_grouped"


def launcher(library):
    """The raw operator, by that library."""

    def run(x, values, scale, bias, a, b, lora_scale):
        rows, inputs = x.shape
        out, layout = values.shape[0], layout_of(values, scale)
        rank = 0 if a is None else a.shape[0]
        y, low = torch.empty(rows, out, dtype=x.dtype), torch.empty(rows, rank)
        group = inputs // scale.shape[1] if layout in ("int8_grouped", "int4") else 0
        argument = QuantizedLinear(
            rows, inputs, out, rank, FloatRows.of(x), LAYOUTS[layout], pointer(values),
            values.stride(0), pointer(scale), 0 if scale is None else scale.stride(0), group,
            FloatRows.of(bias), FloatRows.of(a), FloatRows.of(b), lora_scale, pointer(y),
            pointer(low), out, False, False,
        )  # fmt: skip
        call(library.fastft_quantized_linear, argument)
        return y

    return run


@pytest.fixture
def launch(emulated):
    return launcher(emulated("quantized_linear"))


@pytest.fixture
def launch_in_order(order):
    """Threads from the first to the last, then from the last to the first."""
    return launcher(order("quantized_linear"))


def batch(dtype, layout, rows, inputs, out, rank=0, adapter=torch.float32):
    """Arguments of the raw operator; `layout` is None for a plain weight, or (bits, group)."""
    weight = torch.randn(out, inputs) * 0.05
    values, scale = weight.to(dtype), None
    if layout is not None:
        stored = quantize(weight, *layout)
        values, scale = stored.values, stored.scale
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(out, 2).to(dtype)[:, 0]
    a = torch.randn(rank, inputs).to(adapter) * 0.1 if rank else None
    b = torch.randn(out, rank).to(adapter) if rank else None
    return x, values, scale, bias, a, b, 0.7


def exact_scales(args):
    """Scales that are powers of two, so that every weight is exact in a half type."""
    x, values, scale, *rest = args
    if scale is not None and scale.dtype is torch.bfloat16:
        scale = torch.exp2(torch.randint(-8, -4, scale.shape)).bfloat16()
    return x, values, scale, *rest


GROUPED = [(8, 32), (8, 64), (4, 32), (4, 64)]
STORED = [None, (8, None), *GROUPED]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", STORED, ids=str)
def test_against_the_reference(launch_in_order, dtype, layout):
    """Less than a piece, a warp's share, all warps' and more than a thread has under way."""
    for rows, inputs, out, rank in [
        (1, 64, 9, 0), (3, 192, 17, 3), (8, 1088, 3, 1), (9, 2112, 5, 0), (17, 128, 18, 2),
    ]:  # fmt: skip
        args = exact_scales(batch(dtype, layout, rows, inputs, out, rank))
        assert_same(launch_in_order, _quantized_linear, args)


@pytest.mark.parametrize("layout", GROUPED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grouped_weights_are_rounded_once_to_the_half_type(launch, dtype, layout):
    x, values, scale, *rest = batch(dtype, layout, 5, 320, 17)
    rounded = dequantize(QuantizedWeight(values, scale), dtype)

    def stored(x, rounded, none, *rest):
        return launch(x, values, scale, *rest)

    assert_same(stored, _quantized_linear, (x, rounded, None, *rest))


@pytest.mark.parametrize("layout", [None, (8, None)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [0, 1, 7, 50, 77, 130])
def test_tails_and_rows_at_odd_addresses(launch, dtype, layout, inputs):
    x, values, *rest = batch(dtype, layout, 3, inputs, 5)
    assert_same(launch, _quantized_linear, (x, values, *rest))
    apart = torch.cat((values, values[:, :1]), 1)[:, :inputs]
    beside = torch.cat((x, x[:, :1]), 1)[:, :inputs]
    assert_same(launch, _quantized_linear, (beside, apart, *rest))


def test_int4_at_an_odd_address(launch):
    x, values, *rest = batch(torch.bfloat16, (4, 32), 3, 96, 5)
    moved = torch.cat((values, values[:, :1]), 1)[:, :48]
    assert torch.equal(launch(x, moved, *rest), launch(x, values, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [None, (8, None), (4, 32)], ids=str)
def test_a_row_has_the_same_bits_at_every_width(launch, dtype, layout):
    x, *rest = batch(dtype, layout, 18, 160, 17, 2)
    wide = launch(x, *rest)
    for start, end in [(0, 1), (7, 8), (17, 18), (0, 3), (5, 13), (3, 12)]:
        assert torch.equal(launch(x[start:end], *rest), wide[start:end]), (start, end)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
def test_adapters_and_biases_of_other_types(launch, x_dtype, adapter):
    x, values, scale, bias, a, b, lora_scale = batch(x_dtype, (8, None), 4, 288, 6, 5, adapter)
    args = x, values, scale, bias.to(adapter), a, b, lora_scale
    assert_same(launch, _quantized_linear, args)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16], ids=str)
def test_float32_over_half_weights(launch, weight):
    x, values, *rest = batch(torch.float32, None, 5, 200, 6)
    assert_same(launch, _quantized_linear, (x, values.to(weight), *rest))
