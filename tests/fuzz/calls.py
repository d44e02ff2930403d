"""Random calls of the operators of training: what each computes, what eager PyTorch does, and
arguments. One function per operator, named alike.
"""

from collections.abc import Callable

import torch
from fuzz.draw import DTYPES, Call, Draw
from heads import eager as eager_head
from heads import fused as fused_head
from ops.test_lora import eager as eager_lora
from ops.test_lora import fused as fused_lora
from ops.test_norm import eager_layer_norm, eager_rms_norm, fused_layer_norm, fused_rms_norm
from ops.test_rotary import angles
from ops.test_rotary import eager as eager_rotary
from ops.test_rotary import fused as fused_rotary
from packed import sides
from torch.nn import functional as F

from fastft.ops.cross_entropy import cross_entropy
from fastft.ops.fp8_linear import fp8_linear as fused_fp8_linear
from fastft.ops.fp8_linear import quantize_fp8
from fastft.ops.gated_mlp import gated_mlp
from fastft.ops.int8_linear import int8_linear as fused_int8_linear
from fastft.ops.linear import linear as fused_linear
from fastft.ops.lora import LoraLinear, lora_shared
from fastft.ops.lora_mlp import lora_mlp as fused_lora_mlp
from fastft.ops.lora_onto import lora_onto as fused_lora_onto
from fastft.ops.quantized_linear import QuantizedWeight, dequantize, quantize

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(draw: Draw) -> Call:
    # Of one number the result is its sign, and the gradient what eps and rounding leave.
    dtype, shape = draw.choice(DTYPES), draw.shape(2)
    std = draw.choice([1.0, 1e-3])  # of small ones eps decides
    x, residual = (each(*shape, dtype=dtype, std=std) for each in (draw.tensor, draw.maybe))
    weight = draw.maybe(shape[-1], dtype=dtype)
    offset = 0.0 if weight is None else draw.choice([0.0, 1.0])
    return Call(fused_rms_norm, eager_rms_norm, [x, residual, weight, offset])


def layer_norm(draw: Draw) -> Call:
    # Of one number, the deviation is nothing, and what eager's is, is rounding.
    dtype, shape = draw.choice(DTYPES), draw.shape(3)
    std = draw.choice([1.0, 1e-3])  # of small ones eps decides
    x, residual = (each(*shape, dtype=dtype, std=std) for each in (draw.tensor, draw.maybe))
    weight = draw.maybe(shape[-1], dtype=dtype)
    bias = None if weight is None else draw.maybe(shape[-1], dtype=dtype)
    return Call(fused_layer_norm, eager_layer_norm, [x, residual, weight, bias])


def gated(draw: Draw) -> Call:
    dtype, shape, name = draw.choice(DTYPES), draw.shape(), draw.choice(list(ACTIVATIONS))
    args = [draw.tensor(*shape, dtype=dtype), draw.tensor(*shape, dtype=dtype)]
    return Call(
        lambda gate, up: gated_mlp(gate, up, name),
        lambda gate, up: ACTIVATIONS[name](gate) * up,
        args,
    )


def rotary(draw: Draw) -> Call:
    dtype, batch, tokens = draw.choice(DTYPES), draw.size(4), draw.size(40)
    dim = 2 * draw.size(40, 1)
    turned = 2 * draw.randint(1, dim // 2)
    heads = [draw.tensor(batch, draw.size(5), tokens, dim, dtype=dtype).detach() for _ in range(2)]
    axis = draw.choice([1, 2])
    heads = [x.transpose(1, 2) if axis == 2 else x for x in heads]
    held = angles(draw.choice([1, batch]), tokens, turned, dtype)
    return Call(fused_rotary, eager_rotary, [*(x.requires_grad_() for x in heads), *held, axis])


def linear(draw: Draw) -> Call:
    dtype, shape, out = draw.choice(DTYPES), draw.shape(1), draw.size(90)
    args = [draw.tensor(*shape, dtype=dtype), draw.tensor(out, shape[-1], dtype=dtype, std=0.2)]
    return Call(fused_linear, F.linear, [*args, draw.maybe(out, dtype=dtype)])


def _adapted(draw: Draw, inputs: int, out: int, dtype) -> list:
    """weight, bias, a, b, transposed, as test_lora's sides take them."""
    low = draw.choice([dtype, torch.float32])
    transposed = draw.random() < 0.3
    rank = draw.size(20, 1)
    sizes = (inputs, out) if transposed else (out, inputs)
    return [
        draw.tensor(*sizes, dtype=dtype, std=0.1, grad=False),
        None if draw.random() < 0.5 else draw.tensor(out, dtype=dtype),
        draw.tensor(rank, inputs, dtype=low, std=0.1),
        draw.tensor(out, rank, dtype=low, std=0.1),
        transposed,
    ]


def lora(draw: Draw) -> Call:
    dtype, shape = draw.choice(DTYPES), draw.shape(1)
    return Call(
        fused_lora,
        eager_lora,
        [draw.tensor(*shape, dtype=dtype), *_adapted(draw, shape[-1], draw.size(90, 1), dtype)],
    )


def _several(function: Callable, count: int, joined: Callable) -> Callable:
    """function of x and of (weight, bias, a, b, transposed) count times, flat as they are given."""

    def call(x, *flat):
        return joined(x, [flat[5 * i : 5 * i + 5] for i in range(count)], function)

    return call


def _layer(held) -> LoraLinear:
    weight, bias, a, b, transposed = held
    return LoraLinear(weight, bias, a, b, 1.7, transposed=transposed)


def shared(draw: Draw) -> Call:
    dtype, shape, count = draw.choice(DTYPES), draw.shape(1), draw.randint(1, 3)
    args = [draw.tensor(*shape, dtype=dtype)]
    for _ in range(count):
        args += _adapted(draw, shape[-1], draw.size(60, 1), dtype)
    return Call(
        _several(None, count, lambda x, parts, _: lora_shared(x, [_layer(p) for p in parts])),
        _several(eager_lora, count, lambda x, parts, one: tuple(one(x, *p) for p in parts)),
        args,
    )


def lora_mlp(draw: Draw) -> Call:
    shape, inner = draw.shape(1), draw.size(60, 1)
    name, args = draw.choice(list(ACTIVATIONS)), [draw.tensor(*shape)]
    for inputs, out in ((shape[-1], inner), (shape[-1], inner), (inner, shape[-1])):
        args += [*_adapted(draw, inputs, out, torch.float32)]
    args[10] = args[5]  # gate and up lie alike
    if args[6].shape != args[1].shape:
        args[6] = args[6].detach().t()
    return Call(
        _several(None, 3, lambda x, p, _: fused_lora_mlp(x, *map(_layer, p), name)),
        _several(
            eager_lora,
            3,
            lambda x, p, one: one(ACTIVATIONS[name](one(x, *p[0])) * one(x, *p[1]), *p[2]),
        ),
        args,
    )


def onto(draw: Draw) -> Call:
    dtype, shape, out = draw.choice(DTYPES), draw.shape(1), draw.size(90, 1)
    _, _, a, b, _ = _adapted(draw, shape[-1], out, dtype)
    y = draw.tensor(*shape[:-1], out, dtype=dtype)
    return Call(
        lambda y, x, a, b: fused_lora_onto(y + 0, x, LoraLinear(None, None, a, b, 1.7)),
        lambda y, x, a, b: (y + F.linear(F.linear(x.to(a.dtype), a), b) * 1.7).to(y.dtype),
        [y, draw.tensor(*shape, dtype=dtype), a, b],
    )


def _labels(draw: Draw, shape: tuple, vocab: int) -> torch.Tensor:
    labels = torch.randint(0, vocab, shape)
    labels[torch.rand(shape) < draw.choice([0.0, 0.4, 0.9])] = -100
    if labels.numel():
        labels.view(-1)[-1] = 0  # one label at least, where eager would give NaN
    return labels


def _loss_options(draw: Draw, rows: int) -> dict:
    found = draw.options(label_smoothing=[0.1, 1.0], softcap=[0.5, 30.0], reduction=["sum", "none"])
    # The mean of nothing is NaN in PyTorch, and 0 here.
    return found if rows else found | {"reduction": "sum"}


def loss(draw: Draw) -> Call:
    dtype, (*leading, vocab) = draw.choice(DTYPES), draw.shape(2)
    labels = _labels(draw, tuple(leading), vocab)
    weight = torch.rand(vocab) + 0.1 if draw.random() < 0.3 else None
    options = _loss_options(draw, labels.numel())
    plain = {n: v for n, v in options.items() if n != "softcap"}

    def eager(logits):
        cap, wide = options.get("softcap"), torch.promote_types(logits.dtype, torch.float32)
        z = logits.to(wide).reshape(-1, vocab)
        z = z if cap is None else cap * torch.tanh(z / cap)
        held = None if weight is None else weight.to(wide)
        found = F.cross_entropy(z, labels.flatten(), held, **plain)
        return found.view(labels.shape) if found.dim() else found

    args = [draw.tensor(*leading, vocab, dtype=dtype)]
    return Call(lambda logits: cross_entropy(logits, labels, weight=weight, **options), eager, args)


def head(draw: Draw) -> Call:
    dtype, (*leading, hidden), vocab = draw.choice(DTYPES), draw.shape(1), draw.size(90, 2)
    leading = leading or [1]
    labels = _labels(draw, tuple(leading), vocab)
    options = _loss_options(draw, labels.numel()) | draw.options(logit_scale=[0.3])
    x, weight = (
        draw.tensor(*leading, hidden, dtype=dtype),
        draw.tensor(vocab, hidden, dtype=dtype, std=0.1),
    )
    bias = draw.maybe(vocab, dtype=dtype)
    low = [draw.tensor(3, hidden, std=0.2), draw.tensor(vocab, 3)]
    low = (
        [t.detach().to(dtype).requires_grad_() for t in low] if draw.random() < 0.5 else [None] * 2
    )
    if draw.random() < 0.3:  # the other form takes less
        bias, low = None, [None] * 2
        options = {n: v for n, v in options.items() if n != "label_smoothing"}
        blockwise = options | {"form": "blockwise"}
    else:
        blockwise = options
    return Call(
        lambda *args: fused_head(*args, None, labels, blockwise),
        lambda *args: eager_head(*args, None, labels, options).view(
            labels.shape if options.get("reduction") == "none" else ()
        ),
        [x, weight, bias, *low],
    )


def attention(draw: Draw) -> Call:
    dtype, groups, kv_heads = draw.choice(DTYPES), draw.randint(1, 3), draw.randint(1, 3)
    lengths = [draw.size(70) for _ in range(draw.randint(0, 4))]
    other = [draw.size(70) for _ in lengths] if draw.random() < 0.3 else None
    options = draw.options(
        causal=[True], window=[1, 5, 70], softcap=[0.7, 3.0], scale=[0.3, -0.2, 0.0]
    )
    ours, eager = sides(lengths, other, **options)
    dim, heads = draw.size(130, 1), groups * kv_heads
    tokens = sum(lengths if other is None else other)
    shapes = [(sum(lengths), heads, dim), *[(tokens, kv_heads, dim)] * 2]
    # Of one visible key the gradient of q and k is nothing but rounding.
    grad = options.get("window") != 1 and 1 not in lengths + (other or [])
    return Call(ours, eager, [draw.tensor(*shape, dtype=dtype, grad=grad) for shape in shapes])


def _over(weight: QuantizedWeight) -> Callable:
    """The product with the weight that the numbers stand for, in float32 at least."""

    def eager(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), dequantize(weight, wide)).to(x.dtype)

    return eager


def int8_linear(draw: Draw) -> Call:
    """On an input that rounding does not change; gradients are rounded."""
    dtype, (*leading, inputs), out = draw.choice(DTYPES), draw.shape(1), draw.size(90)
    weight = quantize(torch.randn(out, inputs) * 0.05)

    # Whole numbers with a peak of 127, also beside the columns that stay out, are rounded to
    # themselves.
    x = torch.randint(-127, 128, (*leading, inputs)).to(dtype)
    x[..., :17] = 127
    return Call(lambda x: fused_int8_linear(x, weight), _over(weight), [x])


def fp8_linear(draw: Draw) -> Call:
    """On an input that rounding does not change; gradients are rounded."""
    dtype, (*leading, inputs), out = draw.choice(DTYPES), draw.shape(1), draw.size(90)
    weight = quantize_fp8(torch.randn(out, inputs) * 0.05)

    x = torch.randint(-16, 17, (*leading, inputs)).to(dtype)  # all of them numbers of e4m3
    x[..., :1] = 448
    return Call(lambda x: fused_fp8_linear(x, weight), _over(weight), [x])


TRAINING = (
    rms_norm, layer_norm, gated, rotary, linear, lora, shared, lora_mlp, onto, loss, head,
    attention, int8_linear, fp8_linear,
)  # fmt: skip
