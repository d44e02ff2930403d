"""quantized_linear: layouts as described, values against float64, the same bits at every width."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from truth import assert_as_exact, assert_same_bits_for_any_threads

from fastft.ops.quantized_linear import (
    Adapter,
    QuantizedWeight,
    _quantized_linear,
    dequantize,
    quantize,
    quantized_linear,
    rounded,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (bits, group) of every stored layout, and the three plain ones.
KINDS = [(8, None), (8, 32), (8, 64), (4, 32), (4, 64), *DTYPES]


def make_weight(kind, out, inputs):
    weight = torch.randn(out, inputs) * 0.05
    return QuantizedWeight(weight.to(kind)) if kind in DTYPES else quantize(weight, *kind)


def make_inputs(dtype, kind, rows, inputs, out, rank=0, adapter=torch.float32):
    """The raw operator's arguments."""
    weight = make_weight(kind, out, inputs)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(out).to(dtype)
    a = (torch.randn(rank, inputs) * 0.1).to(adapter) if rank else None
    b = torch.randn(out, rank).to(adapter) if rank else None
    return x, weight.values, weight.scale, bias, a, b, 0.7


def fused(x, values, scale, bias, a, b, lora_scale):
    lora = None if a is None else Adapter(a, b, lora_scale)
    weight = QuantizedWeight(values, scale) if x.dtype is not torch.float64 else None
    if weight is None:
        return _quantized_linear(x, values, scale, bias, a, b, lora_scale)
    return quantized_linear(x, weight, bias, lora)


def unpacked(values, scale):
    """W in float64, element by element, as the layout is described."""
    if scale is None:
        return values.double()
    if values.dtype is torch.uint8:
        out, width = values.shape[0], values.shape[1] * 2
        numbers = torch.empty(out, width, dtype=torch.float64)
        for i in range(width):
            byte = values[:, i // 32 * 16 + i % 16].int()
            numbers[:, i] = (byte // 16 if i % 32 >= 16 else byte % 16) - 8
    else:
        numbers = values.double()
    group = numbers.shape[1] // max(1, scale.shape[1])
    return numbers * scale.double().repeat_interleave(group, 1)


def eager(x, values, scale, bias, a, b, lora_scale):
    """What PEFT computes over the dequantised weight, in x's dtype (adapters in theirs)."""
    weight = unpacked(values, scale).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if a is None:
        return y
    low = torch.nn.functional.linear(x.to(a.dtype), a)
    return (y + torch.nn.functional.linear(low, b) * lora_scale).to(x.dtype)


@pytest.mark.parametrize("bits, group", KINDS[:5])
def test_quantize_is_nearest_and_never_clips(bits, group):
    torch.manual_seed(bits)
    weight = torch.randn(6, 128) * torch.logspace(-30, 30, 6)[:, None]
    weight[2, 64:] = 0
    stored = quantize(weight, bits, group)
    assert stored.shape == (6, 128)
    exact = unpacked(stored.values, stored.scale)
    torch.testing.assert_close(dequantize(stored, torch.float64), exact, rtol=0, atol=0)
    width = 128 // stored.scale.shape[1]
    step = stored.scale.double().repeat_interleave(width, 1)
    numbers = exact / step
    error = (weight.double() - exact).abs() / step.abs()
    # A value at half a step may fall either way in float32. Only 8 has no number, in int4.
    clipped = (numbers == 7) & (weight.double() / step > 7.5) & (bits == 4)
    assert bool((error <= torch.where(clipped, 1, 0.5000001)).all())
    largest = 127 if bits == 8 else 8
    peaks = weight.double().reshape(6, -1, width).abs().amax(2)
    scale = stored.scale.double().abs()
    assert bool((peaks <= largest * scale).all())
    tight = peaks * (1 + (2**-7 if group else 2**-23))
    assert bool((largest * scale <= tight)[peaks > 0].all())
    if bits == 4:
        signed = torch.where(peaks > 0, numbers.reshape(6, -1, width).amin(2), -8)
        assert bool((signed <= -7).all())


@pytest.mark.parametrize("bits, group", KINDS[:5])
def test_zeros_and_numbers_next_to_zero(bits, group):
    zeros = quantize(torch.zeros(3, 64), bits, group)
    assert bool((zeros.scale == 1).all()) and not dequantize(zeros).any()
    tiny = torch.full((2, 64), 1e-45)
    assert bool(torch.isfinite(dequantize(quantize(tiny, bits, group))).all())
    assert quantize(torch.zeros(0, 64), bits, group).shape == (0, 64)
    assert quantize(torch.zeros(4, 0), bits, group).shape == (4, 0)


def test_layouts_byte_by_byte():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 16], weight[0, 33], weight[0, 63] = 7, -8, 3, 16
    stored = quantize(weight, 4, 32)
    assert stored.values[0, 0] == (-8 + 8) * 16 + (7 + 8)
    assert stored.values[0, 17] == 8 * 16 + (-2 + 8)  # 3 / -2, to the even one
    assert stored.values[0, 31] == (-8 + 8) * 16 + 8
    assert stored.scale.tolist() == [[1.0, -2.0]] and stored.scale.dtype is torch.bfloat16
    eight = quantize(weight, 8)
    assert eight.values.is_contiguous() and eight.values[0, 63] == 127
    # As it lies for the library's integer product, which training on it will use.
    x = torch.randint(-127, 127, (32, 64), dtype=torch.int8)
    product = torch._int_mm(x, eight.values.repeat(16, 1).t())
    assert torch.equal(product[:, 0].double(), x.double() @ eight.values[0].double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_eager(isa, kind, dtype):
    grouped = not (kind in DTYPES or kind[1] is None)
    for rows, inputs, out, rank in [
        (1, 64, 9, 0), (2, 192, 3, 5), (5, 128, 33, 8), (7, 576, 20, 1), (16, 1152, 18, 19),
        (40, 640, 7, 64), (3, 64, 5, 256),
    ]:  # fmt: skip
        args = make_inputs(dtype, kind, rows, inputs, out, rank)
        assert_as_exact(fused, eager, args)
        if not grouped:
            assert_as_exact(fused, eager, make_inputs(dtype, kind, rows, inputs + 13, out, rank))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20), st.integers(0, 70), st.integers(0, 40), st.integers(0, 20),
    st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(rows, inputs, out, rank, kind, dtype, adapter):
    if kind not in DTYPES and kind[1] is not None:
        inputs = inputs // 8 * kind[1]
    args = make_inputs(dtype, kind, rows, inputs, out, rank, adapter)
    x, values, scale, bias, a, b, lora_scale = args
    # Adapters of a wider type than eager's are compared in that type's eager.
    wide = [None if t is None else t.float() for t in (a, b)]
    assert_as_exact(fused, eager, (x, values, scale, bias, *wide, lora_scale))
    y = fused(*args)
    assert y.shape == (rows, out) and y.is_contiguous()
    torch.testing.assert_close(y, fused(x, values, scale, bias, *wide, lora_scale), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 8, 21])
def test_a_row_has_the_same_bits_at_every_width(isa, kind, dtype, rank):
    """Alone, among 2 to 17, among 40; with other rows beside it, and NaN in them."""
    for inputs in (1088, 1088 + 7 if kind in DTYPES or kind == (8, None) else 576):
        x, *rest = make_inputs(dtype, kind, 300, inputs, 21, rank)
        alone = torch.cat([fused(row, *rest) for row in x.split(1)])
        for width in (*range(2, 18), 40, 300):
            for start in (0, 3):
                batch = x[start : start + width]
                assert torch.equal(fused(batch, *rest), alone[start : start + width]), width
        batch = x[:16].clone()
        batch[4] = float("nan")
        kept = [r for r in range(16) if r != 4]
        assert torch.equal(fused(batch, *rest)[kept], alone[:16][kept])


@pytest.mark.parametrize("kind", [(8, None), (4, 32), torch.float32])
def test_same_bits_for_any_thread_count(isa, kind):
    args = make_inputs(torch.float32, kind, 16, 640, 333, 8)
    assert_same_bits_for_any_threads(lambda: fused(*args))
    if kind not in DTYPES:
        weight = QuantizedWeight(*args[1:3])
        assert_same_bits_for_any_threads(lambda: rounded_on(weight, args[0]))


def rounded_on(weight, x):
    return quantized_linear(x, replace(weight, round_inputs=True))


@pytest.mark.parametrize("kind", KINDS[:5])
def test_inputs_that_int8_holds_are_multiplied_exactly(isa, kind):
    """Numbers whose rounding changes nothing: the result is as exact as without it."""
    for rows, inputs in [(1, 64), (2, 576), (3, 128), (4, 1152), (16, 192), (21, 64), (1, 77)]:
        if inputs % 64 and kind[1] is not None:
            continue
        weight = make_weight(kind, 13, inputs)
        numbers = torch.randint(-127, 128, (rows, inputs)).float()
        numbers[:, ::32] = 127 * torch.randn(numbers[:, ::32].shape).sign()
        runs = (inputs + 31) // 32
        powers = torch.exp2(torch.randint(-20, 20, (rows, runs)).float())
        x = numbers * powers.repeat_interleave(32, 1)[:, :inputs]
        assert torch.equal(rounded(x), x)
        args = (x, weight.values, weight.scale, None, None, None, 0.0)

        def ours(x, values, scale, *_):
            if x.dtype is torch.float64:
                return _quantized_linear(x, values, scale, None, None, None, 0.0)
            return rounded_on(QuantizedWeight(values, scale), x)

        assert_as_exact(ours, eager, args)


@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_inputs(isa, kind, dtype):
    """Within half a step of each input of the exact product, and beside the reference's."""
    for rows, inputs in [(1, 64), (7, 576), (40, 128), (2, 95)]:
        if inputs % 64 and kind[1] is not None:
            continue
        weight, x = make_weight(kind, 21, inputs), torch.randn(rows, inputs).to(dtype)
        x[0, 3] = 50  # makes the others of its run coarse
        exact = unpacked(weight.values, weight.scale)
        y = rounded_on(weight, x)
        assert y.dtype is dtype
        padded = torch.nn.functional.pad(x.double(), (0, -inputs % 32)).unflatten(1, (-1, 32))
        step = (padded.abs().amax(2) / 127).repeat_interleave(32, 1)[:, :inputs]
        last_place = 2 * torch.finfo(dtype).eps * y.abs().double()
        bound = 0.5001 * step @ exact.abs().t() + last_place + 1e-6
        assert bool(((y.double() - x.double() @ exact.t()).abs() <= bound).all())
        near = rounded(x.float()).double() @ exact.t()
        # But for an input at half a step, which may fall either way.
        one = 1.01 * step.amax(1, keepdim=True) * exact.abs().amax()
        assert bool(((y - near).abs() <= last_place + one).all())
        assert bool(((y - near).abs() <= last_place + 1e-5).double().mean() > 0.5)
        # A row has the same bits at every width, for any threads.
        alone = torch.cat([rounded_on(weight, row) for row in x.split(1)])
        assert torch.equal(alone, y)


@pytest.mark.parametrize("kind", KINDS[:5])
def test_rounded_inputs_of_no_input(isa, kind):
    """An empty sum is 0, and not what the memory held."""
    weight = replace(quantize(torch.randn(9, 0), *kind), round_inputs=True)
    assert torch.equal(quantized_linear(torch.randn(12, 0), weight), torch.zeros(12, 9))


@pytest.mark.parametrize("kind", KINDS[:5])
def test_rounded_inputs_that_are_not_finite_or_vanish(isa, kind):
    weight = make_weight(kind, 9, 128)
    x = torch.randn(5, 128)
    clean = rounded_on(weight, x)
    x[1, 40], x[2, 127], x[3] = float("nan"), float("-inf"), 1e-38
    y = rounded_on(weight, x)
    assert bool(y[1:3].isnan().all()) and bool((y[3] == 0).all())
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    assert bool(rounded(x)[1, 32:64].isnan().all()) and not rounded(x)[1, :32].isnan().any()
    # The adapter sees x as it is.
    a, b = torch.randn(4, 128), torch.randn(9, 4)
    lora = quantized_linear(x[:1], replace(weight, round_inputs=True), lora=Adapter(a, b, 0.5))
    torch.testing.assert_close(lora - y[:1], x[:1] @ a.t() @ b.t() * 0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(kind):
    x, values, scale, bias, a, b, lora_scale = make_inputs(torch.float32, kind, 12, 128, 10, 6)
    weight = QuantizedWeight(values, scale)
    wanted = quantized_linear(x, weight, bias, Adapter(a, b, lora_scale))

    def apart(t):
        """The same numbers with a gap after each row."""
        return None if t is None else torch.cat((t, t), 1)[:, : t.shape[1]]

    def columns(t):
        return t.t().contiguous().t()

    for lay in (apart, columns):
        lora = Adapter(lay(a), lay(b), lora_scale)
        stored = QuantizedWeight(lay(values), scale if scale is None else lay(scale))
        spread = torch.stack((bias, bias), 1)[:, 0]
        torch.testing.assert_close(quantized_linear(lay(x), stored, spread, lora), wanted)
    cube = quantized_linear(x.view(2, 2, 3, 128).transpose(0, 1), weight, bias)
    flat = quantized_linear(x, weight, bias).view(2, 2, 3, 10).transpose(0, 1)
    torch.testing.assert_close(cube, flat)
    one = quantized_linear(x[0], weight, bias)
    assert one.shape == (10,)
    torch.testing.assert_close(one, flat[0, 0, 0])


def test_tensor_as_weight_and_other_types_of_adapter_and_bias():
    x, values, _, bias, a, b, lora_scale = make_inputs(torch.bfloat16, torch.bfloat16, 3, 50, 8, 4)
    for dtype in DTYPES:
        lora = Adapter(a.to(dtype), b.to(dtype), lora_scale)
        got = quantized_linear(x, values, bias.to(dtype), lora)
        wanted = eager(
            x.double(), values, None, bias.to(dtype), lora.a.double(), lora.b.double(), lora_scale
        )
        torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-6)


def test_float64_goes_through_the_reference():
    args = make_inputs(torch.float64, (4, 32), 3, 64, 8, 4)
    got = quantized_linear(args[0], QuantizedWeight(*args[1:3]), args[3], Adapter(*args[4:]))
    wide = [None if t is None else t.double() for t in args[3:6]]
    wanted = eager(args[0], *args[1:3], *wide, args[6])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_opcheck():
    for kind in (torch.float32, (8, None), (8, 32), (4, 64)):
        opcheck(_quantized_linear.op, make_inputs(torch.float32, kind, 3, 64, 5, 4))
    opcheck(_quantized_linear.op, make_inputs(torch.bfloat16, (4, 32), 3, 64, 5))


def test_compiles_in_one_graph():
    args = make_inputs(torch.float32, (4, 32), 3, 64, 8, 4)
    x, values, scale, bias, a, b, lora_scale = args

    def call(x, bias, a, b):
        lora = Adapter(a, b, lora_scale)
        return quantized_linear(x, QuantizedWeight(values, scale), bias, lora)

    got = torch.compile(call, fullgraph=True)(x, bias, a, b)
    assert torch.equal(got, fused(*args))


def test_autocast_sets_the_result_s_type():
    x, values, scale, bias, a, b, lora_scale = make_inputs(torch.float32, (8, None), 3, 64, 8, 4)
    weight, lora = QuantizedWeight(values, scale), Adapter(a, b, lora_scale)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, weight, bias, lora)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, quantized_linear(x.bfloat16(), weight, bias, lora))


def test_gradients_are_refused():
    x, values, scale, bias, a, b, lora_scale = make_inputs(torch.float32, (8, None), 3, 64, 8, 4)
    weight, lora = QuantizedWeight(values, scale), Adapter(a.requires_grad_(), b, lora_scale)
    with pytest.raises(ValueError, match="no gradients"):
        quantized_linear(x, weight, bias, lora)
    with pytest.raises(ValueError, match="no gradients"):
        torch.func.jvp(lambda x: quantized_linear(x, weight), (x,), (x,))
    with torch.no_grad():
        assert quantized_linear(x, weight, bias, lora).shape == (3, 8)
    with pytest.raises(ValueError, match="no gradients"):
        quantized_linear(x, torch.randn(8, 64, requires_grad=True))


def test_errors_name_the_argument():
    x, weight = torch.randn(2, 64), quantize(torch.randn(8, 64), 4, 32)
    a, b = torch.randn(4, 64), torch.randn(8, 4)
    for error, match, call in [
        (TypeError, "x: expected floating", lambda: quantized_linear(x.long(), weight)),
        (TypeError, "x: expected floating", lambda: quantized_linear(torch.tensor(1.0), weight)),
        (ValueError, "x: expected 64 inputs", lambda: quantized_linear(x[:, :60], weight)),
        (ValueError, r"bias: expected shape \(8,\)", lambda: quantized_linear(x, weight, b)),
        (TypeError, "bias: expected", lambda: quantized_linear(x, weight, torch.arange(8))),
        (ValueError, "lora: expected a", lambda: quantized_linear(x, weight, None, Adapter(b, a))),
        (TypeError, "lora.a", lambda: quantized_linear(x, weight, None, Adapter(a.long(), b))),
        (TypeError, "lora.b", lambda: quantized_linear(x, weight, None, Adapter(a, b.double()))),
        (ValueError, "rank", lambda: quantized_linear(x, weight, None, Adapter(a[:0], b[:, :0]))),
        (ValueError, "bias: expected device", lambda: quantized_linear(
            x, weight, b[:, 0].to("meta"))),
        (TypeError, "weight: expected", lambda: quantized_linear(x, torch.randn(8, 64).double())),
        (ValueError, "bits: expected 8 or 4", lambda: quantize(x, 3)),
        (ValueError, "group: expected None", lambda: quantize(x, 8, 16)),
        (ValueError, "group: expected a divisor", lambda: quantize(x[:, :32], 4, 64)),
        (ValueError, "weight: expected finite", lambda: quantize(x / 0)),
        (TypeError, "weight: expected floating", lambda: quantize(x.long())),
        (ValueError, "scale: expected None", lambda: QuantizedWeight(x, x)),
        (ValueError, "scale: expected a tensor", lambda: QuantizedWeight(weight.values)),
        (TypeError, "scale: expected bfloat16", lambda: QuantizedWeight(weight.values, x)),
        (ValueError, "scale: expected shape", lambda: QuantizedWeight(weight.values, x.bfloat16())),
        (ValueError, "values: expected a multiple", lambda: QuantizedWeight(
            weight.values[:, :8], weight.scale)),
        (TypeError, "values: expected floating", lambda: QuantizedWeight(x.long())),
        (ValueError, "values: expected two", lambda: QuantizedWeight(x[0])),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()
