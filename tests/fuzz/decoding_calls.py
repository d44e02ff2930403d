"""Random calls of the operators of decoding, as calls.py has those of training."""

from dataclasses import replace

import torch
from fuzz.draw import DTYPES, Call, Draw
from ops.test_decode_attention import eager as eager_decode
from ops.test_decode_attention import inputs as decode_inputs
from ops.test_decode_attention import ours as our_decode
from ops.test_decoder_layer import KINDS, make_cache, make_layer, place, plain
from torch.nn import functional as F

from fastft.ops.decoder_layer import NormWeight, decoder_layers
from fastft.ops.decoder_layer import decoder_layer as fused_decoder_layer
from fastft.ops.quantized_linear import Adapter, dequantize
from fastft.ops.quantized_linear import quantize as fused_quantize
from fastft.ops.quantized_linear import quantized_linear as fused_quantized_linear


def decode(draw: Draw) -> Call:
    dtype, kv_heads, queries = draw.choice(DTYPES), draw.randint(1, 3), draw.size(16)
    lengths = [draw.size(300) for _ in range(draw.randint(0, 3))]
    options = draw.options(window=[1, 5, 70], softcap=[0.7, 3.0], scale=[0.3, -0.2])
    dim, heads = draw.size(130, 1), kv_heads * draw.randint(1, 3)
    args = decode_inputs(dtype, lengths, queries, heads, kv_heads, dim)
    return Call(our_decode(lengths, **options), eager_decode(lengths, **options), list(args))


def _stored(draw: Draw, out: int, inputs: int):
    weight = torch.randn(out, inputs) * 0.05
    bits, group = draw.choice([(8, None), (8, 32), (8, 64), (4, 32), (4, 64)])
    if inputs % (group or 1) or draw.random() < 0.2:
        bits, group = 8, None
    return fused_quantize(weight, bits, group)


def quantized_linear(draw: Draw) -> Call:
    dtype, (*leading, _) = draw.choice(DTYPES), draw.shape()
    out, inputs = draw.size(90), draw.choice([draw.size(130), 32, 64, 128, 192])
    weight = _stored(draw, out, inputs)
    bias = None if draw.random() < 0.5 else draw.tensor(out, dtype=dtype, grad=False)
    lora, rank = None, draw.size(20, 1)
    if draw.random() < 0.5:
        lora = Adapter(torch.randn(rank, inputs) * 0.1, torch.randn(out, rank), 0.7)

    def eager(x, bias):
        # What the kernel promises: sums of float32, whatever x is.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.linear(x.to(wide), dequantize(weight, wide), None if bias is None else bias.to(wide))
        if lora is not None:
            y = y + F.linear(F.linear(x.to(wide), lora.a.to(wide)), lora.b.to(wide)) * lora.scale
        return y.to(x.dtype)

    x = draw.tensor(*leading, inputs, dtype=dtype, grad=False)
    if weight.scale is not None and draw.random() < 0.4:
        weight = replace(weight, round_inputs=True)
        # Whole numbers with a peak of 127 in each run are rounded to themselves.
        x.copy_(torch.randint(-127, 128, x.shape))[..., ::32] = 127
    return Call(lambda x, bias: fused_quantized_linear(x, weight, bias, lora), eager, [x, bias])


def quantize(draw: Draw) -> Call:
    """Weights that a layout holds come back as they were."""
    dtype, out, inputs = draw.choice(DTYPES), draw.size(60), 64 * draw.size(4)
    bits, group = draw.choice([(8, None), (8, 32), (8, 64), (4, 32), (4, 64)])
    largest = 127 if bits == 8 else 8
    numbers = torch.randint(-largest + (bits == 4), largest, (out, inputs))
    numbers[:, :: group or max(inputs, 1)] = -largest  # the scale is then what it is multiplied by
    weight = draw.tensor(out, inputs, dtype=dtype, grad=False).copy_(numbers * 2.0**-7)
    return Call(
        lambda w: dequantize(fused_quantize(w, bits, group), w.dtype), lambda w: w + 0, [weight]
    )


def decoder_layer(draw: Draw) -> Call:
    """New tokens of several rows over a cache, from the first token on or behind others."""
    kind = draw.choice(KINDS)
    weights = draw.choice([torch.float32, torch.bfloat16, torch.float16, 8, 4])
    # Of few inputs a norm makes nearly one number, and the result is mostly rounding.
    run = 32 if weights == 4 else 1  # int4 takes inputs in runs
    dim = 16 if weights == 4 else 2 * draw.size(20, 1)
    ranks = tuple(draw.size(12, 1) for _ in range(draw.randint(0, 2)))
    options = draw.options(window=[1, 5, 70], softcap=[0.7, 3.0], offset=[1.0])
    if kind != "gpt2" and draw.random() < 0.3:
        options |= {n: NormWeight(torch.rand(dim) + 0.5) for n in ("query_norm", "key_norm")}
    layer = make_layer(
        kind, weights, ranks, draw.getrandbits(30), hidden=max(8, run * draw.size(70 // run, 1)),
        inner=run * draw.size(70 // run, 1), heads=2 * draw.randint(1, 3), dim=dim,
        **options,
    )  # fmt: skip
    hidden = layer.linears[0].weight.shape[1]
    before = [draw.size(40) for _ in range(draw.randint(1, 3))]
    counts = [draw.size(20) for _ in before]
    chosen = [draw.randint(-1, len(ranks) - 1) for _ in before] if ranks else None
    context = [torch.randn(count, hidden) for count in before]
    turned = 2 * draw.randint(1, dim // 2) if draw.random() < 0.3 else dim
    keys, values = make_cache(len(before), dim=dim)
    with torch.no_grad():
        first = place(before, [0] * len(before), chosen, not layer.center, turned)
        fused_decoder_layer(torch.cat(context), layer, keys, values, first)
    tokens = place(counts, before, chosen, not layer.center, turned)
    apply = draw.choice([
        lambda x, *cache: fused_decoder_layer(x, layer, *cache, tokens),
        lambda x, keys, values: decoder_layers(x, [layer], [keys], [values], tokens),
    ])  # fmt: skip

    def eager(x):
        rows, outs = zip(context, x.split(counts), chosen or [-1] * len(before), strict=True), []
        for old, new, one in rows:
            whole = torch.cat((old.to(x.dtype), new))
            outs.append(plain(layer, whole, None if one < 0 else one, turned)[len(old) :])
        return torch.cat(outs)

    x = draw.tensor(sum(counts), hidden, grad=False)
    return Call(lambda x: apply(x.contiguous(), keys.clone(), values.clone()), eager, [x])


DECODING = (decode, quantized_linear, quantize, decoder_layer)
